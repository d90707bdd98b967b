"""How each documented command is run by tests/docs/test_documented_commands.py: what makes it small, or why it is not
run.

A new command in a page that fits no rule here fails the test. Usually the script has a rule already, and nothing is to
do; what takes too long gets one more line in RULES, a file that only a reader would have one in FILES of
tests/helpers/documented_files.py.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What holds for the commands in which the regular expression `of` is found. All rules that fit apply, in order."""

    of: str
    put: str = ""  # options in place of the documented ones, or in addition
    instead: str = ""  # options in place of the documented ones, where these are given
    replace: tuple[str, str] | None = None  # (regular expression, replacement) in every word
    processes: int = 1  # of a run that torchrun starts; with 1 its script is run in this process

    def fits(self, command: str) -> bool:
        """Whether the rule is for this command."""
        return re.search(self.of, command) is not None


# A network of a few thousand weights on pictures of 8x8, 2,048 images of them.
_TINY_RUN = (
    "--channels=4 --channel-mult=1,2 --num-blocks=1 --attn-resolutions=4 --batch=256 --duration=2Ki --snapshot=1Ki"
    " --status=1Ki --checkpoint=1Ki"
)

RULES = [
    Rule(of=r"generate_images\.py", put="--steps=2 --seeds=0-9"),
    Rule(of=r"reconstruct_phema\.py", instead="--outkimg=33554"),
    Rule(of=r"(reconstruct_phema|sweep)\.py.*\.\.\.", put="--outstd=0.050,0.100,...,0.150"),
    Rule(of=r"calculate_metrics\.py ref", put="--workers=0", instead="--features=20"),
    Rule(of=r"calculate_metrics\.py gen", put="--num-images=12 --steps=2"),
    Rule(of=r"calculate_metrics\.py calc", put="--num-images=8 --workers=0"),
    Rule(of=r"sweep\.py", put="--num-images=12 --steps=2 --batch=12"),
    Rule(of=r"dataset_tool\.py convert", put="--resolution=32x32 --workers=1", instead="--shards=2"),
    Rule(of=r"dataset_tool\.py encode", put="--model-url=./my-vae", instead="--shards=2"),
    Rule(of=r"dataset_tool\.py decode", put="--model-url=./my-vae"),
    Rule(of=r"dataset_tool\.py inspect"),
    Rule(of=r"train_edm2\.py(?!.*(--init|--network))", put=_TINY_RUN, instead="--batch-gpu=128"),
    Rule(
        of=r"train_edm2\.py.*--network",
        put="--batch=16 --duration=32 --snapshot=16 --status=16 --checkpoint=16",
        instead="--network-args=width=16,depth=1",
    ),
    Rule(of=r"train_edm2\.py.*--dataset=discs", put="--dataset-args=num=20,side=8 --batch=16 --duration=32"),
    # The preset for small data takes 32x32 pixels and more.
    Rule(of=r"dataset_tool\.py convert.*mine\.zip", put="--resolution=32x32"),
    Rule(of=r"train_edm2\.py.*--preset=small", put="--batch=8 --duration=16 --snapshot=8 --attn-resolutions=16"),
    Rule(of=r"train_edm2\.py.*--preset=fashion(?!.*(--init|--data))", put="--data=tiny/pictures.zip"),
    Rule(
        of=r"train_edm2\.py.*--data=datasets/fashion",
        replace=(r"^--data=datasets/fashion.*$", "--data=tiny/pictures.zip"),
    ),
    Rule(of=r"train_edm2\.py.*--encode-on-the-fly", put="--batch=4 --duration=8 --snapshot=0 --attn-resolutions=8"),
    Rule(of=r"train_edm2\.py.*--init", put="--batch=4 --duration=8"),
    Rule(
        of=r"train_edm2\.py",
        instead="--metrics-num=12 --metrics-every=1Ki --metrics-steps=2 --samples-steps=2 --samples=2",
    ),
    Rule(of=r"train_edm2\.py.*--samples", put="--samples-steps=2"),
    Rule(of=r"train_edm2\.py.*--metrics", put="--metrics-steps=2"),
    # The continuation of the run before it.
    Rule(of=r"train_edm2\.py.*--duration=32Ki --snapshot=1Ki", put="--duration=3Ki"),
    Rule(of=r"torchrun .*--outdir=training-runs/two", processes=2, put="--duration=1Ki"),
    Rule(of=r"/shared/", replace=(r"^(--\w+=)/shared/", r"\1shared/")),
    Rule(of=r"convert_snapshot\.py|report\.py"),
    # A network that is conditioned on pictures, which no other of that name is.
    Rule(of=r"--net=net\.pkl --source=small", replace=(r"^--net=net\.pkl$", "--net=conditioned.pkl")),
    # Counting takes its time for every layer, whatever its width.
    Rule(of=r"count_flops\.py", replace=(r"^edm2-img512-[a-z]+$", "fashion")),
    Rule(of=r"count_flops\.py.*-guid-", replace=(r"^edm2-img512-.*-guid-.*$", "demo")),
    Rule(of=r"toy_example\.py plot"),
    Rule(of=r"toy_example\.py train", put="--iters=4"),
]

# Regular expressions of commands that are not run, with the reason.
NOT_RUN = {
    r"^make ": "each is minutes of what others of these tests are seconds of",
    r"^(pip|\S*python -m pip) ": "installs packages",
    r"^docker ": "needs docker",
    r"^rclone ": "fetches gigabytes",
    r"^(df|gcc|python -c) ": "shows what a machine has",
    r"^python explore\.py": "a server; tests/edm2/explorer/test_explore_page.py runs it in a browser",
    r"^tensorboard ": "a server that runs until it is stopped",
    r"^(OMP_NUM_THREADS=1 )?python -m benchmarks\.": "minutes; benchmarks are not tests",
    r"^python -m http\.server": "a server that runs until it is stopped",
    r"^python data/make_fashion_mnist\.py": "reads the original files of Fashion-MNIST",
}

# (regular expression, replacement) in Python examples, to make them small.
PYTHON = [
    (r"num_inference_steps=18", "num_inference_steps=2"),
    (r"seeds=range\(\d+\)", "seeds=range(12), num_steps=2"),
]
