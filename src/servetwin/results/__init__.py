"""What happened: the tables of a run, its metrics, its files."""
