"""Packs the images of a Manifest into tar shards: `spml-fast prepare shard`. `data/shards.py` reads them.

    options.py   what to pack and how
    images.py    one image: read, checked, shrunk if asked for
    plan.py      which samples each shard holds
    writer.py    one shard and its record
    run.py       all shards, over worker processes; resumes a run that was cut off
    result.py    the Manifest of the packed images
    upload.py    shards and Manifest on object storage
    command.py   the command line

Work is done in `OUT.packing` beside the final place (of a URL, in the user's cache), shard by shard:

    plan.json plan.npz   the settings, and which samples each shard holds; a run that was cut off resumes from it
    shards/NAME.tar      under its final name only when it is whole
    NAME.npz             its record (index, sizes, checksum), written after it: a shard without a record does not count

A shard's content depends on the images and the options alone, never on the number of processes or on how often the
work was cut off. `prepare/tar_source.py` reads images out of other people's tar files.
"""

from spml_fast.prepare.pack.options import PackOptions
from spml_fast.prepare.pack.run import pack

__all__ = ["PackOptions", "pack"]
