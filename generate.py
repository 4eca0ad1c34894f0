"""Put a product into a new scene. Its own pixels stay, and a certificate proves it."""

from packshot.cli import run_stage

if __name__ == "__main__":
    run_stage("generate")
