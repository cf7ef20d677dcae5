"""The command `ssmcache`: one file a command, each a thin call of the simulator's public functions."""
