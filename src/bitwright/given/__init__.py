"""Files from anybody are read as data: nothing here runs what a file says, and what is no data is refused."""
