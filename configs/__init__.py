"""Values only: fully commented YAML."""
