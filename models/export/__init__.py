"""Profiles that write a pruned model in the form that another runtime reads."""
