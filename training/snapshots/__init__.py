"""Network files and folders: their forms, their parts, where a name leads."""
