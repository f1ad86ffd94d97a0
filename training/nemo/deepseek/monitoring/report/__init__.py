"""``deepseek report``: one self-contained HTML page about runs, from their logs alone."""
