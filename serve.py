"""Serve generation over HTTP."""

from packshot.config.cli import script

if __name__ == "__main__":
    script("serve", "packshot.serve.app:serve", __doc__)
