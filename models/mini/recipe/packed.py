"""The pack's weights as the repository keeps them: `x.safetensors.gz`, the same bytes in a quarter less room.

    python packed.py            # unpacks the pack above this folder, beside the packed files; git ignores what it writes
    python packed.py --pack     # packs what lies there
"""
import sys
import zlib
from pathlib import Path

GZIP = 16 + 15  # zlib's window of 2^15 bytes, with a gzip header that holds no name and no time


def pack(folder):
    """Writes every weight file of the pack as gzip too."""
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        # Low bytes of bfloat16 are noise: only lengths from six bytes on are worth a reference.
        deflate = zlib.compressobj(9, zlib.DEFLATED, GZIP, 9, zlib.Z_FILTERED)
        path.with_name(path.name + ".gz").write_bytes(deflate.compress(path.read_bytes()) + deflate.flush())


def unpack(folder):
    """Writes every packed weight file plainly, over one that lies there."""
    for path in sorted(Path(folder).glob("*/*.safetensors.gz")):
        path.with_suffix("").write_bytes(zlib.decompress(path.read_bytes(), GZIP))


if __name__ == "__main__":
    (pack if "--pack" in sys.argv else unpack)(Path(__file__).resolve().parent.parent)
