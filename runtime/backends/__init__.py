"""One file per engine, all with the same small interface."""
