"""Public data sets: download, conversion to the columns that the configs name, and data sets from git histories."""
