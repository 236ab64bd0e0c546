"""The documented messages of Caffe that this package understands, as classes made at import.

Names, numbers, types and defaults are those of ``src/caffe/proto/caffe.proto`` of BVLC Caffe, which files on disk
depend on. They live in a descriptor pool of their own: pycaffe, imported in the same process, registers a package of
the same name. A field of Caffe that is not listed here is one that no engine would honour; the text reader refuses it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

TRAIN, TEST = 0, 1
"""Values of the enum Phase."""

SOLVER_TYPES = ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")

_ENUMS: dict[str, str] = {
    "Phase": "TRAIN TEST",
    "VarianceNorm": "FAN_IN FAN_OUT AVERAGE",
    "SnapshotFormat": "HDF5 BINARYPROTO",
    "SolverMode": "CPU GPU",
    "NormalizationMode": "FULL VALID BATCH_SIZE NONE",
    "DB": "LEVELDB LMDB",
    "Engine": "DEFAULT CAFFE CUDNN",
    "PoolMethod": "MAX AVE STOCHASTIC",
    "RoundMode": "CEIL FLOOR",
    "NormRegion": "ACROSS_CHANNELS WITHIN_CHANNEL",
}
"""Values by enum, numbered from 0. An enum other than Phase is nested in the message that uses it."""

# One line a field: name, number, type ("*" repeated, "*p" repeated and packed), default.
_MESSAGES: dict[str, str] = {
    "BlobShape": "dim 1 int64*p",
    "BlobProto": """shape 7 BlobShape
        data 5 float*p
        diff 6 float*p
        double_data 8 double*p
        double_diff 9 double*p
        num 1 int32 0
        channels 2 int32 0
        height 3 int32 0
        width 4 int32 0""",
    "BlobProtoVector": "blobs 1 BlobProto*",
    "Datum": """channels 1 int32
        height 2 int32
        width 3 int32
        data 4 bytes
        label 5 int32
        float_data 6 float*
        encoded 7 bool false""",
    "FillerParameter": """type 1 string constant
        value 2 float 0
        min 3 float 0
        max 4 float 1
        mean 5 float 0
        std 6 float 1
        sparse 7 int32 -1
        variance_norm 8 VarianceNorm FAN_IN""",
    "NetState": """phase 1 Phase TEST
        level 2 int32 0
        stage 3 string*""",
    "NetStateRule": """phase 1 Phase
        min_level 2 int32
        max_level 3 int32
        stage 4 string*
        not_stage 5 string*""",
    "ParamSpec": """name 1 string
        lr_mult 3 float 1
        decay_mult 4 float 1""",
    "TransformationParameter": """scale 1 float 1
        mirror 2 bool false
        crop_size 3 uint32 0
        mean_file 4 string
        mean_value 5 float*
        force_color 6 bool false
        force_gray 7 bool false""",
    "LossParameter": """ignore_label 1 int32
        normalization 3 NormalizationMode VALID
        normalize 2 bool""",
    "AccuracyParameter": """top_k 1 uint32 1
        axis 2 int32 1
        ignore_label 3 int32""",
    "BatchNormParameter": """use_global_stats 1 bool
        moving_average_fraction 2 float 0.999
        eps 3 float 1e-5""",
    "BiasParameter": """axis 1 int32 1
        num_axes 2 int32 1
        filler 3 FillerParameter""",
    "ConvolutionParameter": """num_output 1 uint32
        bias_term 2 bool true
        pad 3 uint32*
        kernel_size 4 uint32*
        stride 6 uint32*
        dilation 18 uint32*
        pad_h 9 uint32 0
        pad_w 10 uint32 0
        kernel_h 11 uint32
        kernel_w 12 uint32
        stride_h 13 uint32
        stride_w 14 uint32
        group 5 uint32 1
        weight_filler 7 FillerParameter
        bias_filler 8 FillerParameter
        engine 15 Engine DEFAULT
        axis 16 int32 1""",
    "DataParameter": """source 1 string
        batch_size 4 uint32
        backend 8 DB LEVELDB
        prefetch 10 uint32 4""",
    "DropoutParameter": "dropout_ratio 1 float 0.5",
    "FlattenParameter": """axis 1 int32 1
        end_axis 2 int32 -1""",
    "InnerProductParameter": """num_output 1 uint32
        bias_term 2 bool true
        weight_filler 3 FillerParameter
        bias_filler 4 FillerParameter
        axis 5 int32 1
        transpose 6 bool false""",
    "InputParameter": "shape 1 BlobShape*",
    "LRNParameter": """local_size 1 uint32 5
        alpha 2 float 1
        beta 3 float 0.75
        norm_region 4 NormRegion ACROSS_CHANNELS
        k 5 float 1
        engine 6 Engine DEFAULT""",
    "MemoryDataParameter": """batch_size 1 uint32
        channels 2 uint32
        height 3 uint32
        width 4 uint32""",
    "PoolingParameter": """pool 1 PoolMethod MAX
        pad 4 uint32 0
        pad_h 9 uint32 0
        pad_w 10 uint32 0
        kernel_size 2 uint32
        kernel_h 5 uint32
        kernel_w 6 uint32
        stride 3 uint32 1
        stride_h 7 uint32
        stride_w 8 uint32
        engine 11 Engine DEFAULT
        global_pooling 12 bool false
        round_mode 13 RoundMode CEIL""",
    "ReLUParameter": """negative_slope 1 float 0
        engine 2 Engine DEFAULT""",
    "ScaleParameter": """axis 1 int32 1
        num_axes 2 int32 1
        filler 3 FillerParameter
        bias_term 4 bool false
        bias_filler 5 FillerParameter""",
    "SigmoidParameter": "engine 1 Engine DEFAULT",
    "SoftmaxParameter": """engine 1 Engine DEFAULT
        axis 2 int32 1""",
    "TanHParameter": "engine 1 Engine DEFAULT",
    "LayerParameter": """name 1 string
        type 2 string
        bottom 3 string*
        top 4 string*
        phase 10 Phase
        loss_weight 5 float*
        param 6 ParamSpec*
        blobs 7 BlobProto*
        include 8 NetStateRule*
        exclude 9 NetStateRule*
        transform_param 100 TransformationParameter
        loss_param 101 LossParameter
        accuracy_param 102 AccuracyParameter
        batch_norm_param 139 BatchNormParameter
        bias_param 141 BiasParameter
        convolution_param 106 ConvolutionParameter
        data_param 107 DataParameter
        dropout_param 108 DropoutParameter
        flatten_param 135 FlattenParameter
        inner_product_param 117 InnerProductParameter
        input_param 143 InputParameter
        lrn_param 118 LRNParameter
        memory_data_param 119 MemoryDataParameter
        pooling_param 121 PoolingParameter
        relu_param 123 ReLUParameter
        scale_param 142 ScaleParameter
        sigmoid_param 124 SigmoidParameter
        softmax_param 125 SoftmaxParameter
        tanh_param 127 TanHParameter""",
    # Recognised so that a file of the old format can be named as such; nothing reads its content.
    "V1LayerParameter": "name 4 string",
    "NetParameter": """name 1 string
        state 6 NetState
        layer 100 LayerParameter*
        layers 2 V1LayerParameter*""",
    "SolverParameter": """net 24 string
        net_param 25 NetParameter
        train_net 1 string
        test_net 2 string*
        train_state 26 NetState
        test_state 27 NetState*
        test_iter 3 int32*
        test_interval 4 int32 0
        test_initialization 32 bool true
        base_lr 5 float
        display 6 int32
        average_loss 33 int32 1
        max_iter 7 int32
        iter_size 36 int32 1
        lr_policy 8 string
        gamma 9 float
        power 10 float
        momentum 11 float
        weight_decay 12 float
        regularization_type 29 string L2
        stepsize 13 int32
        stepvalue 34 int32*
        clip_gradients 35 float -1
        snapshot 14 int32 0
        snapshot_prefix 15 string
        snapshot_format 37 SnapshotFormat BINARYPROTO
        snapshot_after_train 28 bool true
        solver_mode 17 SolverMode GPU
        device_id 18 int32 0
        random_seed 20 int64 -1
        type 40 string SGD
        delta 31 float 1e-8
        momentum2 39 float 0.999
        rms_decay 38 float 0.99""",
    "SolverState": """iter 1 int32
        learned_net 2 string
        history 3 BlobProto*
        current_step 4 int32 0""",
}

LAYER_PARAMETERS: dict[str, tuple[str, ...]] = {
    "Accuracy": ("accuracy_param",),
    "BatchNorm": ("batch_norm_param",),
    "Bias": ("bias_param",),
    "Convolution": ("convolution_param",),
    "Data": ("data_param", "transform_param"),
    "Dropout": ("dropout_param",),
    "Flatten": ("flatten_param",),
    "InnerProduct": ("inner_product_param",),
    "Input": ("input_param",),
    "LRN": ("lrn_param",),
    "MemoryData": ("memory_data_param", "transform_param"),
    "Pooling": ("pooling_param",),
    "ReLU": ("relu_param",),
    "Scale": ("scale_param",),
    "Sigmoid": ("sigmoid_param",),
    "Softmax": ("softmax_param",),
    "SoftmaxWithLoss": ("softmax_param", "loss_param"),
    "TanH": ("tanh_param",),
}
"""The messages that may stand in a layer, by its type."""

LAYER_TYPES = frozenset(LAYER_PARAMETERS)


def enum_name(message: Any, field: str) -> str:
    """Return the name of enum ``field``'s value, its default where it is not set."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    return str(kind.values_by_number[getattr(message, field)].name)


def _file() -> Any:
    """Return the file descriptor of all messages."""
    file = descriptor_pb2.FileDescriptorProto(name="sparkgauge/caffe.proto", package="caffe", syntax="proto2")
    _add_enum(file.enum_type.add(), "Phase")
    for name, lines in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for line in lines.splitlines():
            _add_field(message, *line.split())
    return file


def _add_enum(target: Any, name: str) -> None:
    target.name = name
    for number, value in enumerate(_ENUMS[name].split()):
        target.value.add(name=value, number=number)


def _add_field(message: Any, name: str, number: str, kind: str, default: str | None = None) -> None:
    kinds, labels = descriptor_pb2.FieldDescriptorProto, descriptor_pb2.FieldDescriptorProto
    base, star, packed = kind.partition("*")
    field = message.field.add(name=name, number=int(number))
    field.label = labels.LABEL_REPEATED if star else labels.LABEL_OPTIONAL
    if default is not None:
        field.default_value = default
    if packed:
        field.options.packed = True
    if base in _ENUMS:
        field.type = kinds.TYPE_ENUM
        field.type_name = ".caffe.Phase" if base == "Phase" else f".caffe.{message.name}.{base}"
        if base != "Phase" and base not in [nested.name for nested in message.enum_type]:
            _add_enum(message.enum_type.add(), base)
    elif base in _MESSAGES:
        field.type, field.type_name = kinds.TYPE_MESSAGE, f".caffe.{base}"
    else:
        field.type = getattr(kinds, f"TYPE_{base.upper()}")


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_file().SerializeToString())


def message_class(name: str) -> Any:
    """Return the class of the message ``name``, e.g. ``NetParameter``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"caffe.{name}"))


BlobProto = message_class("BlobProto")
BlobProtoVector = message_class("BlobProtoVector")
BlobShape = message_class("BlobShape")
Datum = message_class("Datum")
FillerParameter = message_class("FillerParameter")
LayerParameter = message_class("LayerParameter")
LossParameter = message_class("LossParameter")
NetParameter = message_class("NetParameter")
NetState = message_class("NetState")
NetStateRule = message_class("NetStateRule")
ParamSpec = message_class("ParamSpec")
SolverParameter = message_class("SolverParameter")
SolverState = message_class("SolverState")
TransformationParameter = message_class("TransformationParameter")
