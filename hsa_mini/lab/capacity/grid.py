"""The models of the capacity law: every chunk size S, retrieval dimension R and number of landmarks
M of a chunk. In training each of them reads as many tokens as the baseline.
"""

from itertools import product

from hsa_mini.hsa_model import HSAModel
from hsa_mini.lab.arms import Arm
from hsa_mini.lab.mechanisms.landmarks import FourLandmarks, TwoLandmarks
from hsa_mini.lab.scales import Scale

CHUNK_SIZES = (16, 32, 64)
RETRIEVAL_DIMS = (64, 128, 256)
LANDMARKS = {1: HSAModel, 2: TwoLandmarks, 4: FourLandmarks}


def grid_arm(S: int, R: int, M: int) -> Arm:
    """The model with chunks of S tokens and M landmarks of R numbers for each of them."""

    def sizes(scale: Scale) -> dict:
        read = scale.config.chunk_size * scale.config.top_k
        return {"chunk_size": S, "top_k": read // S, "retrieval_dim": M * R}

    what = f"chunks of {S} tokens, landmarks of {R} numbers, {M} for each chunk"
    return Arm(f"s{S}_r{R}_m{M}", what, LANDMARKS[M], changes=sizes)


_ARMS = (grid_arm(*sizes) for sizes in product(CHUNK_SIZES, RETRIEVAL_DIMS, LANDMARKS))
GRID = {arm.name: arm for arm in _ARMS}
