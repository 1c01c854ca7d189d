import contextlib
import pickle


def read_metadata(path):
    return pickle.load(open(path / ".metadata", "rb"))


@contextlib.contextmanager
def refusing(path):
    yield


def apply():
    pass
