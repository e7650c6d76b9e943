"""OpenImages V3 to V7: image-level labels that people verified, a few of thousands of classes for each image.

    spml-fast prepare openimages --labels TRAIN.csv VAL.csv TEST.csv --classes classes-trainable.txt
        --descriptions class-descriptions.csv --images DIR --out DIR

The official files, and the module that reads them:

    label CSV          ImageID,Source,LabelName,Confidence    0 absent, 1 present; machine labels 0.5 to 1.0
                       label_files.py reads the rows, grouping.py makes labels by image (growing_array.py holds both),
                       split_names.py says whose
    image list         11 columns in V3, 12 with Rotation from V4 on: image_lists.py
    trainable classes  one class id (/m/01g317) per line; class_files.py
    class names        LabelName,DisplayName; V6 and V7 have that header, V3 to V5 none; class_files.py
    images             ID.jpg in any folders: image_folder.py

Image ids are 16 hexadecimal digits and are kept as uint64 (ids.py). csv_blocks.py reads CSV files of any size and finds
the line that is wrong; dataset.py puts everything together.

Source: docs/sources.md#openimages.
"""

from spml_fast.prepare.datasets.openimages.dataset import OpenImages

__all__ = ["OpenImages"]
