"""What a data set consists of: folders and archives, their index, single items, labels."""
