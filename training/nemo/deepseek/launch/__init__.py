"""Wing: starting, joining and watching the processes of a run."""
