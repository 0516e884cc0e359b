"""What operators are to someone who looks at a graph: where the work is, and where only shapes are moved about."""

KINDS = {
    "attention": "attention",
    "matmul": "matrix products",
    "norm": "norms",
    "activation": "activations",
    "cache": "attention cache",
    "quantization": "quantization",
    "elementwise": "elementwise arithmetic",
    "shape": "shapes and data movement",
    "other": "other operators",
}

_OPERATORS = {
    "attention": "Attention MultiHeadAttention DecoderMaskedMultiHeadAttention GroupQueryAttention PackedAttention "
    "PackedMultiHeadAttention QAttention RotaryEmbedding",
    "matmul": "MatMul Gemm Conv ConvTranspose Einsum MatMulInteger QLinearMatMul ConvInteger QLinearConv DynamicQuantizeMatMul "
    "MatMulIntegerToFloat MatMulNBits FusedMatMul FusedGemm FusedConv LSTM GRU RNN",
    "norm": "LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization GroupNormalization "
    "SkipSimplifiedLayerNormalization InstanceNormalization BatchNormalization LpNormalization EmbedLayerNormalization",
    "activation": "Gelu FastGelu BiasGelu QuickGelu Relu LeakyRelu PRelu Elu Selu Celu Silu Swish Mish Sigmoid HardSigmoid HardSwish "
    "Tanh Erf Softmax LogSoftmax Softplus Softsign",
    "cache": "TensorScatter",
    "quantization": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear GatherBlockQuantized",
    "elementwise": "Add Sub Mul Div Pow Sqrt Reciprocal Exp Log Neg Abs Sign Min Max Mean Sum Mod Clip Floor Ceil Round Where And Or "
    "Not Xor Equal Less LessOrEqual Greater GreaterOrEqual Sin Cos CumSum ArgMax ArgMin TopK IsNaN IsInf BitwiseAnd BitwiseOr "
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL2 ReduceSumSquare BiasAdd AveragePool MaxPool "
    "GlobalAveragePool GlobalMaxPool",
    "shape": "Shape Size Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Gather GatherND GatherElements Expand Tile "
    "Pad Cast CastLike Constant ConstantOfShape Range Identity Scatter ScatterND ScatterElements Trilu OneHot NonZero EyeLike "
    "Resize SpaceToDepth DepthToSpace Dropout",
}
_KIND_OF = {operator: kind for kind, operators in _OPERATORS.items() for operator in operators.split()}


def kind_of(operator: str) -> str:
    """One of KINDS; ``operator`` may name its domain: "com.microsoft::FastGelu"."""
    return _KIND_OF.get(operator.rpartition("::")[2], "other")
