import torch

from stochastic_depth.block_program.memory import Buffers


def image(channels=4, dtype=torch.float32):
    return torch.empty(2, channels, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)


def test_what_is_given_back_is_taken_again():
    buffers = Buffers()
    like = image()
    first, second = buffers.take(like), buffers.take(like)
    assert len({tensor.data_ptr() for tensor in (like, first, second)}) == 3
    assert first.is_contiguous(memory_format=torch.channels_last)
    buffers.give(first)
    assert [tensor.data_ptr() for tensor in buffers] == [first.data_ptr()]
    assert buffers.take(like) is first
    assert not list(buffers)


def test_another_shape_or_type_is_another_buffer():
    buffers = Buffers()
    given = buffers.take(image())
    buffers.give(given)
    for like in (image(channels=8), image(dtype=torch.bfloat16)):
        taken = buffers.take(like)
        assert (taken.shape, taken.dtype) == (like.shape, like.dtype)
    assert next(iter(buffers)) is given
