"""Examples; each folder is one that runs."""
