"""The same networks and the same training step in PyTorch, for benchmarks.versus_torch.

Backbones are torchvision's and timm's own modules; what they do not have is written here, its
parts named as the parts of medattn_jax's modules, so that the weights of one fit the other.
Zoom-in-Net is written twice: `Users`, as one writes it first, and `Best`, as well as it can be.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class ConvBN(nn.Module):
  """Convolution, normalisation, ReLU."""

  def __init__(self, inputs, outputs, kernel=1, stride=1, padding=None, relu=True):
    super().__init__()
    padding = (kernel - 1) // 2 if padding is None else padding
    self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    self.bn = nn.BatchNorm2d(outputs)
    self.relu = relu

  def forward(self, x):
    x = self.bn(self.conv(x))
    return F.relu(x) if self.relu else x


class ResNetSmall(nn.Module):
  """medattn_jax's own small network: each halving a convolution as wide as its stride.

  Args:
    ends: in "features", "pooled" or, through a head of so many classes, "logits".
  """

  def __init__(self, blocks, ends, classes=None, widths=(32, 64, 128)):
    super().__init__()
    self.blocks, self.ends, self.channels = blocks, ends, widths[-1]
    inputs = 3
    for number, (width, count) in enumerate(zip(widths, blocks, strict=True)):
      side = 2 if number else 4
      self.add_module(f"down{number}", ConvBN(inputs, width, side, side, 0))
      for block in range(count):
        self.add_module(f"stage{number}_{block}_1", ConvBN(width, width, 3))
        self.add_module(f"stage{number}_{block}_2", ConvBN(width, width, 3, relu=False))
      inputs = width
    if ends == "logits":
      self.fc = nn.Linear(inputs, classes)

  def forward(self, x):
    for number, count in enumerate(self.blocks):
      side = 2 if number else 4
      rows, columns = -x.shape[2] % side, -x.shape[3] % side
      if rows or columns:
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
      x = self.get_submodule(f"down{number}")(x)
      for block in range(count):
        y = self.get_submodule(f"stage{number}_{block}_1")(x)
        x = F.relu(x + self.get_submodule(f"stage{number}_{block}_2")(y))
    if self.ends == "features":
      return x
    pooled = x.float().mean((2, 3))
    return pooled if self.ends == "pooled" else self.fc(pooled)


OWN = {"resnet_small": (0, 1, 1), "resnet_local": (0, 1, 0)}


def classifier(name: str, classes: int) -> nn.Module:
  """A network with its head; without dropout, whose chance is another in each library."""
  from benchmarks import parity

  if name in OWN:
    return ResNetSmall(OWN[name], "logits", classes)
  return _without_dropout(parity.torch_model(name, classes=classes))


def trunk(name: str, size: int) -> tuple[nn.Module, int]:
  """A network up to its last features [B, C, h, w], and C."""
  from benchmarks import parity

  if name in OWN:
    net = ResNetSmall(OWN[name], "features")
    return net, net.channels
  net = parity.torch_model(name, classes=1)
  if name == "inception_resnet_v2":
    net.conv2d_7b, net.classif = nn.Identity(), nn.Identity()
    net.forward = net.forward_features
  elif name.startswith("resnet"):
    net.fc, net.avgpool = nn.Identity(), nn.Identity()
    net.forward = lambda x: _resnet(net, x)
  else:
    raise ValueError(f"{name}: its trunk is not written")
  with torch.no_grad():
    return net, net.eval()(torch.zeros(1, 3, size, size)).shape[1]


def _resnet(net, x):
  x = net.maxpool(F.relu(net.bn1(net.conv1(x))))
  return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def pooling(name: str, size: int) -> tuple[nn.Module, int]:
  """A network up to its pooled features [B, C], and C."""
  from benchmarks import parity

  if name in OWN:
    net = ResNetSmall(OWN[name], "pooled")
    return net, net.channels
  net = parity.torch_model(name, classes=1)
  if name != "inception_v3" and not name.startswith("resnet"):
    raise ValueError(f"{name}: its pooled features are not written")
  width = net.fc.in_features
  net.fc = nn.Identity()
  return _without_dropout(net), width


def _without_dropout(net: nn.Module) -> nn.Module:
  for module in net.modules():
    if isinstance(module, nn.Dropout):
      module.p = 0.0
  return net


class MainNet(nn.Module):
  def __init__(self, page):
    super().__init__()
    self.backbone, channels = trunk(page.model.backbone, page.data.image_size)
    self.neck = ConvBN(channels, page.model.neck_features)
    self.head = nn.Linear(2 * page.model.neck_features, page.model.num_classes)

  def forward(self, x):  # [P·2, 3, s, s], the eyes of a patient together
    m = self.neck(self.backbone(x))
    pooled = m.float().mean((2, 3)).reshape(-1, 2, m.shape[1])
    pair = torch.cat([pooled, pooled.flip(1)], -1).flatten(0, 1)
    return self.head(pair), m, pair


class AttentionNet(nn.Module):
  def __init__(self, page):
    super().__init__()
    model = page.model
    self.score = nn.Conv2d(model.neck_features, model.num_classes, 1)
    self.conv0 = ConvBN(model.neck_features, model.attention_features, model.attention_kernel)
    self.conv1 = ConvBN(model.attention_features, model.attention_features, model.attention_kernel)
    self.attention = nn.Conv2d(model.attention_features, model.num_classes, 1, bias=False)

  def forward(self, m):
    a = self.attention(self.conv1(self.conv0(m))).float()
    a = a.flatten(2).softmax(-1).reshape(a.shape)
    gated = self.score(m).float() * a
    return gated.sum((2, 3)), gated


class CropNet(nn.Module):
  def __init__(self, page):
    super().__init__()
    self.backbone, width = pooling(page.model.crop_backbone, page.model.crop_size)
    self.head = nn.Linear(width + 2 * page.model.neck_features, page.model.num_classes)

  def forward(self, patches, pair, regions):  # [P·2·regions, 3, s, s]
    pooled = self.backbone(patches).float()
    pooled = pooled.reshape(-1, regions, pooled.shape[-1]).amax(1)
    return self.head(torch.cat([pooled, pair], -1))


class ZoomInNet(nn.Module):
  def __init__(self, page):
    super().__init__()
    self.page = page
    self.m_net, self.a_net, self.c_net = MainNet(page), AttentionNet(page), CropNet(page)

  def look(self, view):
    y_m, m, pair = self.m_net(view)
    y_a, gated = self.a_net(m)
    return y_m, y_a, pair, gated

  def answer(self, looked, patches):
    y_m, y_a, pair, _ = looked
    y_c = self.c_net(patches, pair, self.page.model.num_regions)
    return (y_m + y_a + y_c, y_m, y_a, y_c)


class Best(ZoomInNet):
  """One upload of the full images; view, selection and crops on the device, in one pass."""

  def __init__(self, page):
    super().__init__(page)
    self.view, self.cut = small_view, cut

  def forward(self, image):  # uint8 [N, full, full, 3]
    looked = self.look(self.view(image, self.page))
    return self.answer(looked, self.cut(image, looked[3].detach(), self.page))


class Users(ZoomInNet):
  """A pass that finds the regions, crops cut by the host, and a second pass that learns."""

  def forward(self, view, patches):
    return self.answer(self.look(view), patches)


def compile_parts(net: nn.Module) -> None:
  """Compiles what a network runs one after another, block by block, each for the shapes it meets.

  (PyTorch calls it regional compilation: blocks that are alike are compiled once.)
  """
  torch._dynamo.config.recompile_limit = 64  # shapes of one class
  for name, part in net.named_children():
    if name == "backbone" or isinstance(part, (nn.Sequential, MainNet, CropNet)):
      compile_parts(part)
    else:
      part.compile(dynamic=False)


def small_view(image: torch.Tensor, page: Any) -> torch.Tensor:
  """The normalised view [N, 3, s, s] of uint8 [N, full, full, 3]; channels last in memory."""
  size = page.data.image_size
  x = image.permute(0, 3, 1, 2).float()
  x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
  return normalised(x, page)


def normalised(x: torch.Tensor, page: Any) -> torch.Tensor:
  """Counts of 255 as the networks want them; one mean and one deviation for all channels."""
  return x.float() * (1 / 255 / page.model.std[0]) - page.model.mean[0] / page.model.std[0]


def select(gated: torch.Tensor, page: Any) -> torch.Tensor:
  """The strongest places [N, num, (row, column)] of the maps [N, levels, h, w], greedily."""
  size, mask, every = page.data.image_size, page.model.mask_size, page.model.mask_scope == "all"
  maps = F.interpolate(gated[:, 1:], (size, size), mode="bilinear", align_corners=False)
  place = torch.arange(size, device=maps.device)
  levels = torch.arange(maps.shape[1], device=maps.device)
  found = []
  for _ in range(page.model.num_regions):
    best = maps.flatten(1).argmax(1)
    level, row, column = best // size**2, best // size % size, best % size
    inside = lambda at: ((place >= at[:, None] - mask // 2)
                         & (place < at[:, None] - mask // 2 + mask))
    own = levels == level[:, None]
    hidden = inside(row)[:, None, :, None] & inside(column)[:, None, None]
    hidden = hidden if every else hidden & own[:, :, None, None]
    maps = maps.masked_fill(hidden, -torch.inf)
    found.append(torch.stack([row, column], -1))
  return torch.stack(found, 1)


def corners(centres: Any, page: Any) -> Any:
  """Top left corners of the crops in the full image, of a tensor or an array of centres."""
  size, full, crop = page.data.image_size, page.data.full_size, page.model.crop_size
  return (((2 * centres + 1) * full - crop * size) // (2 * size)).clip(0, full - crop)


def cut(image: torch.Tensor, gated: torch.Tensor, page: Any) -> torch.Tensor:
  """The normalised crops [N·num, 3, crop, crop] of the strongest places of the maps."""
  first = corners(select(gated, page), page)
  return normalised(gathered(image, first, page), page)


def gathered(image: torch.Tensor, first: torch.Tensor, page: Any) -> torch.Tensor:
  """uint8 [N·num, 3, crop, crop] of uint8 [N, full, full, 3], by one indexing."""
  reach = torch.arange(page.model.crop_size, device=image.device)
  rows, columns = (first[..., axis, None] + reach for axis in (0, 1))
  which = torch.arange(len(image), device=image.device)[:, None, None, None]
  crops = image[which, rows[..., :, None], columns[..., None, :]]
  return crops.flatten(0, 1).permute(0, 3, 1, 2)


def select_on_the_host(gated: np.ndarray, page: Any) -> np.ndarray:
  """As `select`, image by image in NumPy."""
  size, mask, found = page.data.image_size, page.model.mask_size, []
  for one in gated:
    resized = F.interpolate(
      torch.from_numpy(one[None, 1:]), (size, size), mode="bilinear", align_corners=False)
    maps = resized[0].numpy()
    for _ in range(page.model.num_regions):
      level, row, column = np.unravel_index(maps.argmax(), maps.shape)
      top, left = max(0, row - mask // 2), max(0, column - mask // 2)
      which = slice(None) if page.model.mask_scope == "all" else level
      maps[which, top:row - mask // 2 + mask, left:column - mask // 2 + mask] = -np.inf
      found.append((row, column))
  return np.array(found).reshape(len(gated), -1, 2)


def cut_on_the_host(images: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
  """uint8 [N·num, size, size, 3] of uint8 [N, full, full, 3]."""
  return np.stack([image[row:row + size, column:column + size]
                   for image, own in zip(images, first, strict=True) for row, column in own])


class Side:
  """A model, its optimiser and its batches: `step` trains once.

  Args:
    page: of benchmarks.pages, `plain`.
    way: "torch" for a classifier; "best" or "users" for Zoom-in-Net.
    weights: by name, as benchmarks.torch_weights.named has them.
    batches: {"image": uint8 [n, full, full, 3], "level": int [n]} of the host.
    compiled: by torch.compile: "yes", the network as a whole; "parts", block by block, so that
      blocks that are alike are compiled once; "no".
  """

  def __init__(self, page, way, weights, batches, *, compiled: str, channels_last: bool):
    self.page, self.way = page, way
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.amp = page.precision == "bfloat16"
    torch.backends.cudnn.benchmark = True
    makers = {"best": Best, "users": Users}
    net = (makers[way](page) if way in makers
           else classifier(page.model.backbone, page.model.num_classes))
    load(net, weights)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    self.net = net.to(self.device, memory_format=layout).train()
    self.layout = layout
    phase = page.phases["c" if way in makers else "joint"]
    self.optimizer = torch.optim.SGD(
      self.net.parameters(), lr=phase.learning_rate, momentum=phase.momentum,
      **({} if way == "users" else {"fused": True}))
    self.host = [self._ready(batch) for batch in batches]
    self.number = 0
    # As ours, but for `users`: the next batch is brought up beside the step before it.
    ahead = self.device.type == "cuda" and way != "users"
    self.uploads = torch.cuda.Stream() if ahead else None
    self.ahead: tuple[torch.Tensor, ...] | None = None
    self.forward: Callable = {"torch": self._classify, "best": self._best, "users": self._second}[
      way]
    self.normalised = normalised
    if compiled == "yes":
      self.forward = torch.compile(self.forward)
    elif compiled == "parts":
      compile_parts(self.net)
      self.normalised = torch.compile(normalised)
      if way == "best":
        net.view, net.cut = torch.compile(net.view), torch.compile(net.cut)

  def _ready(self, batch):
    """What a data loader would hand over: pinned, and for `users` with the view made."""
    pin = lambda x: x.pin_memory() if self.device.type == "cuda" else x
    image = pin(torch.from_numpy(batch["image"]))
    ready = {"image": image, "level": pin(torch.from_numpy(batch["level"]).long())}
    if self.way == "users":
      ready["array"] = batch["image"]
      ready["view"] = pin(small_view(image, self.page))
    return ready

  def _up(self, x):
    return x.to(self.device, non_blocking=True)

  def _autocast(self):
    return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

  def _classify(self, image, level):
    with self._autocast():
      x = self.normalised(image.permute(0, 3, 1, 2), self.page)
      x = x.contiguous(memory_format=self.layout)
      return F.cross_entropy(self.net(x).float(), level)

  def _best(self, image, level):
    with self._autocast():
      return self._loss(self.net(image), level)

  def _second(self, view, patches, level):
    with self._autocast():
      return self._loss(self.net(view, self.normalised(patches, self.page)), level)

  def _loss(self, answers, level):
    first, *others = (F.cross_entropy(y.float(), level) for y in answers)
    return first + self.page.loss.auxiliary * sum(others)

  def _uploaded(self, batch):
    with torch.cuda.stream(self.uploads):  # None: where everything runs
      return self._up(batch["image"]), self._up(batch["level"])

  def _inputs(self):
    batch, after = (self.host[(self.number + one) % len(self.host)] for one in range(2))
    if self.way != "users":
      ready = self.ahead or self._uploaded(batch)
      if self.uploads:
        here = torch.cuda.current_stream()
        here.wait_stream(self.uploads)
        for x in ready:
          x.record_stream(here)
        self.ahead = self._uploaded(after)
      return ready
    level, view = self._up(batch["level"]), self._up(batch["view"])
    with torch.no_grad(), self._autocast():
      gated = self.net.look(view)[3]
    first = corners(select_on_the_host(gated.cpu().numpy(), self.page), self.page)
    crops = cut_on_the_host(batch["array"], first, self.page.model.crop_size)
    patches = self._up(torch.from_numpy(crops)).permute(0, 3, 1, 2)
    return view, patches, level

  def step(self) -> torch.Tensor:
    """One update; the loss before it, on the device."""
    inputs = self._inputs()
    self.number += 1
    loss = self.forward(*inputs)
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self.optimizer.step()
    return loss.detach()

  def wait(self) -> None:
    if self.device.type == "cuda":
      torch.cuda.synchronize()

  def memory(self) -> int:
    """The most bytes that were held: of the GPU, or of this process."""
    if self.device.type == "cuda":
      return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

  @property
  def kind(self) -> str:
    return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"

  def start(self, steps: int) -> dict[str, Any]:
    """The first steps' losses, and how much longer the first of them took than the last."""
    begin, losses, spent = time.perf_counter(), [], []
    for _ in range(steps):
      losses.append(float(self.step()))
      spent.append(time.perf_counter() - begin)
      begin = time.perf_counter()
    return {"losses": losses, "compile_seconds": max(0.0, spent[0] - min(spent))}


def load(net: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
  """Strictly, but for the counters of the normalisations."""
  state = {name: torch.as_tensor(value) for name, value in weights.items()}
  missing, unexpected = net.load_state_dict(state, strict=False)
  missing = [name for name in missing if not name.endswith("num_batches_tracked")]
  if missing or unexpected:
    raise ValueError(f"weights that do not fit: missing {missing[:4]}, left over {unexpected[:4]}")
