"""Serve generation over HTTP."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("serve")
