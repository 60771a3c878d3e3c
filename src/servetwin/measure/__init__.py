"""Reality: compare a simulated run with a measured one."""
