"""`heliostat upload`: raw data into a bucket."""

import argparse
import time

from heliostat.cli.options import Commands, add_command, open_store
from heliostat.cli.output import MIB, print_now


def add_commands(commands: Commands) -> None:
    command = add_command(
        commands,
        "upload",
        upload,
        "put the files of a local folder into a bucket, as raw data",
        ["heliostat upload my-images s3://heliostat/raw/my-images"],
    )
    command.add_argument("folder", metavar="FOLDER", help="its files keep their paths as keys")
    command.add_argument("root", metavar="URI", help="s3://bucket/prefix")


def upload(options: argparse.Namespace) -> None:
    from pathlib import Path

    from heliostat import storage

    target = open_store(options)
    storage.probe(target)
    began = time.monotonic()
    count, size_bytes = storage.upload_folder(Path(options.folder), target, print_now)
    seconds = time.monotonic() - began
    print(f"{count:,} files, {size_bytes / MIB:.1f} MiB in {seconds:.1f} s")
    print(target.uri)
