"""The checks in the order of their value: correctness before speed, one GPU before several.

Expected values are estimates of ours, made without a GPU, unless they say that something is equal.
"""

from benchmarks.gpu_check import correctness, machine, programs, several, steps
from benchmarks.gpu_check.records import Check

CHECKS = [
    Check(
        name="A0",
        title="machine",
        expected="compiler, Python.h, 1 GB of /dev/shm; on an H100 3.0 TB/s, 790 Tflop/s",
        seconds=40,
        body=machine.machine,
    ),
    Check(name="A1", title="tests marked gpu", expected="all pass, none skipped", seconds=120, body=machine.gpu_tests),
    Check(
        name="B1",
        title="two CUDA graphs at once, and one after the other is gone",
        expected="every replay is equal",
        seconds=40,
        body=correctness.graphs_at_once,
    ),
    Check(
        name="B2",
        title="memory of networks that were dropped",
        expected="flat within 5 % of a network, no collection needed",
        seconds=40,
        body=correctness.dropped_networks,
    ),
    Check(
        name="B3",
        title="waiting of the host in steps and in sampling",
        expected="none",
        seconds=40,
        body=correctness.host_waits,
    ),
    Check(
        name="B4",
        title="noise of seeds, and images in other batches and ways",
        expected="noise to 1e-5, images to 1 gray level",
        seconds=60,
        body=correctness.seeds_and_images,
    ),
    Check(
        name="B5",
        title="number formats against eager float32",
        expected="gradient: fp32 1e-3, tf32 and fp16 0.1, bf16 0.3",
        seconds=60,
        body=correctness.number_formats,
    ),
    Check(
        name="B6",
        title="attention kernels, forward and backward",
        expected="the pinned kernel is within 10 % of the fastest",
        seconds=40,
        body=correctness.attention_kernels,
    ),
    Check(
        name="C1",
        title="compiled training step, two levels of img512-S, 32 images",
        expected="0 graph breaks; gradients equal twice",
        seconds=150,
        body=steps.compiled_step,
    ),
    Check(
        name="C2",
        title="training of img512-S against the plain eager oracle",
        expected="53 % of the matrix rate at 256 images, 45 % at 32",
        seconds=150,
        body=steps.training,
    ),
    Check(
        name="C3",
        title="convolutions of img512-S",
        expected="55 to 75 % of the matrix rate",
        seconds=60,
        body=steps.convolutions,
    ),
    Check(
        name="C4",
        title="sampling of img512-S against the plain eager oracle",
        expected="2.0 times compiled at batch 32, 5 times at batch 1",
        seconds=150,
        body=programs.sampling,
    ),
    Check(
        name="C5",
        title="whole training loop against its step",
        expected="97 % of the step's rate",
        seconds=60,
        body=programs.loop,
    ),
    Check(
        name="C6",
        title="checkpoint in the background",
        expected="pinned memory 1.1 times the state",
        seconds=60,
        body=programs.checkpoint,
    ),
    Check(
        name="C7",
        title="detectors, and moments against float64",
        expected="moments to 1e-12",
        seconds=60,
        body=programs.detectors,
    ),
    Check(
        name="D1",
        title="several GPUs against one",
        expected="loss to 1e-4, weights equal on all",
        seconds=120,
        body=several.agreement,
        gpus=2,
    ),
    Check(
        name="D2",
        title="end of a run on several GPUs",
        expected="after a signal exit code 0; after a lost process all end in 40 s",
        seconds=150,
        body=several.endings,
        gpus=2,
    ),
]
