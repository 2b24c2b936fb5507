"""The application: pages, what they store, and the trigger tasks that follow."""
