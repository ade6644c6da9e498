"""An emulator of Google's storage with an empty bucket named "bucket".

python bucket_emulator.py PORT
"""

import sys

from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

_download = objects.download


def download(request, response, storage, *args, **kwargs):
    """Adds the header by which TensorStore tells one version of an object from another.

    Google's own server sends it; the emulator does not.
    """
    _download(request, response, storage, *args, **kwargs)
    bucket, name = (request.params[key] for key in ("bucket_name", "object_id"))
    if response.status < 300:
        response["x-goog-generation"] = storage.get_file_obj(bucket, name)["generation"]


objects.download = download

if __name__ == "__main__":
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
