"""Train an IP-Adapter: a reference image guides the scene."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("train_ip_adapter")
