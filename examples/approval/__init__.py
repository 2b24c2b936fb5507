"""A human approval: an article is published when an editor says so, on a small web page."""
