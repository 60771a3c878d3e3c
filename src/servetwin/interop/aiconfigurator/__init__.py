"""Kernel times of NVIDIA AIConfigurator, read once from its wheel into kernel profiles (a development tool)."""
