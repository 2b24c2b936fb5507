"""The main example: 944 real questionnaires, each a session, imported page by page."""
