"""`bminf bench --table`: the tables of other authors, measured, predicted and published."""
