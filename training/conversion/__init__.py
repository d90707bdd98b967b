"""From pictures as people have them to a data set. What workers import from here needs neither torch nor a GPU."""
