"""Parts for frameworks. Each is imported by those alone who use that framework."""
