"""What the scripts in this folder share: arguments, tensors of every datatype, refusals."""

import argparse

import numpy as np
from tritonclient.utils import InferenceServerException

# The identity models of the test, by datatype.
IDENTITIES = {
    "FP32": np.float32,
    "FP64": np.float64,
    "FP16": np.float16,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


def arguments(doc):
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--grpc", required=True, help="HOST:PORT")
    parser.add_argument("--http", required=True, help="HOST:PORT")
    parser.add_argument("--protocol", help="grpc or http, where a script can do both")
    parser.add_argument("--image", help="a blue picture")
    parser.add_argument("--question")
    parser.add_argument("--tls", help="folder with ca.pem, client.pem and client.key")
    parser.add_argument("--token")
    return parser.parse_args()


def values(datatype, shape):
    """Values of every kind that a datatype has, the same each time."""
    random = np.random.default_rng(0)
    dtype = IDENTITIES[datatype]
    if datatype == "BOOL":
        return random.integers(0, 2, shape).astype(dtype)
    if datatype.startswith("FP"):
        return random.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def tensor(module, name, array, datatype, **how):
    """An input of a tritonclient module."""
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **how)
    return made


def refused(call, status, words):
    """The status and message that `call` must fail with; `status` may name several."""
    try:
        call()
    except InferenceServerException as error:
        assert str(error.status()).replace("StatusCode.", "") in status, (status, error)
        assert words in error.message(), error
    else:
        raise AssertionError(f"not refused with {status}")
