"""`python -m ssmcache_cli` is the command `ssmcache`."""

from ssmcache_cli.main import run

if __name__ == "__main__":  # the processes of a sweep import this module without running it
    run()
