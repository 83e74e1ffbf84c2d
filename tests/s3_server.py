"""An S3 server for tests: moto over HTTP, in a process of its own, on a free port of this machine."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

START_SECONDS = 60.0


class S3Server:
    """A running server and a client of its own, which knows nothing of the code under test."""

    def __init__(self, url: str) -> None:
        import boto3

        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        keys = {name.lower(): self.environment[name.upper()] for name in ("aws_access_key_id", "aws_secret_access_key")}
        self.client: Any = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)

    def new_bucket(self, versioned: bool = False) -> str:
        """Create a bucket and return its name."""
        name = f"bucket-{secrets.token_hex(8)}"
        self.client.create_bucket(Bucket=name)
        if versioned:
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def contents(self, bucket: str) -> dict[str, bytes]:
        """Return the bytes of every version of every object, by key and version."""
        found = self.client.list_object_versions(Bucket=bucket)
        return {
            f"{each['Key']}?{each['VersionId']}": self.client.get_object(
                Bucket=bucket,
                Key=each["Key"],
                **({} if each["VersionId"] == "null" else {"VersionId": each["VersionId"]}),
            )["Body"].read()
            for each in found.get("Versions", ())
        }


@contextmanager
def running() -> Iterator[S3Server]:
    """Run a server while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
