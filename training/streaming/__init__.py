"""Data sets behind URLs: shards in a store, a bounded copy of them on the disk, and an order to read them in."""
