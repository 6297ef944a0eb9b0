"""Raw data of every form, and what comes out of it without a cluster."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from heliostat.data.pipeline import FORMS
from heliostat.data.raw import Survey, find_source
from heliostat.spec import DataSpec

Read = Callable[..., tuple[Survey, pa.Table]]


@pytest.fixture
def source(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """`source(files)`: a new directory that holds them."""

    def store(files: dict[str, bytes]) -> Path:
        directory = tmp_path / f"raw-{uuid4().hex}"
        directory.mkdir()
        for key, data in files.items():
            path = directory / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return directory

    return store


@pytest.fixture
def read(source: Callable[[dict[str, bytes]], Path]) -> Read:
    """`read(files, **data)`: the survey and all rows of raw files, as one process reads them."""

    def read_files(files: dict[str, bytes], **section: Any) -> tuple[Survey, pa.Table]:
        data = DataSpec(source=str(source(files)), **section)
        found = find_source(data)
        form = FORMS[found.form]
        units = form.split(found)
        survey = form.settle(found, [form.survey(found.store, unit, data) for unit in units], data)
        tables = [rows for unit in units for rows in form.read(found.store, unit, survey.layout)]
        return survey, pa.concat_tables(tables)

    return read_files


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """`png(height, width, mode, colour, format)`: an image file."""

    def encode(
        height: int = 8, width: int = 8, mode: str = "L", colour: Any = 100, form: str = "PNG"
    ) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (width, height), colour).save(file, form)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def idx() -> Callable[[Any], bytes]:
    """`idx(array)`: a gzip-packed IDX file of bytes."""

    def encode(values: Any) -> bytes:
        array = np.asarray(values, np.uint8)
        sizes = np.array(array.shape, ">u4").tobytes()
        return gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes(), mtime=0)

    return encode
