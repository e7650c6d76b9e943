"""Data sets on object storage (S3, Google Cloud Storage, Azure, HTTP): read by ranges, kept in a local cache, written.

    store.py    objects under a URL: read, listed, written; further attempts, and a sentence for what stays wrong. The
                only file that imports fsspec
    cache.py    pieces of shards on the local disk, up to a limit, shared by the processes of a machine
    mirror.py   the files of a Manifest but its images, fetched whole and compared with their checksums
    shards.py   tar shards whose images are read by ranges

What comes from a store is bytes whose checksums are compared; nothing of it is ever unpickled, evaluated or unpacked.
"""
