"""Parts for frameworks, each imported by those alone who use that framework.

May import the storages and what lies below them.
"""
