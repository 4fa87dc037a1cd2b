"""Checkpoints of other libraries: GPTQ, AWQ and compressed-tensors, read and written.

:func:`pumice.load` opens a folder (or a state dict) in one of these formats, and
``pumice.save(model, folder, format=...)`` writes one. The quantized layers become pumice's own;
the bits of the weights are moved, never rounded.

==================  ==========================================  ================================
format              layers read as                              module, with the layout bit by bit
==================  ==========================================  ================================
gptq, gptq_v2       Int4Linear, 2/3/4/8 bits, act-order         :mod:`.gptq`
awq (GEMM order)    Int4Linear, 4 bits                          :mod:`.awq`
compressed-tensors  pack-quantized: Int4Linear, 2/3/4/8 bits    :mod:`.compressed_tensors`
                    int-quantized: Int8Linear, or Int4Linear    :mod:`.schemes`
                    of 8 bits where activations are not int8
                    sparse-24-bitmask: Sparse24Linear           :mod:`.sparse24_bitmask`
==================  ==========================================  ================================

2:4 weights in torch's own tensors (``torch.sparse.to_sparse_semi_structured``) are converted by
:mod:`.semi_structured`.

Each format is one module: ``read`` and ``write`` between the tensors of a layer and
:class:`~._packed.PackedWeight`, and a Reader and a Writer that know the configuration.
"""

from pumice.integrations.formats._packed import PackedWeight
from pumice.integrations.formats.reading import find_config, load_folder, load_state_dict
from pumice.integrations.formats.registry import FORMATS, READERS
from pumice.integrations.formats.writing import save

__all__ = [
    "FORMATS",
    "READERS",
    "PackedWeight",
    "find_config",
    "load_folder",
    "load_state_dict",
    "save",
]
