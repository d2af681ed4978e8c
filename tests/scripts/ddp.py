"""Train with DDP. The four lines of snapshotd are marked; the rest is an ordinary script."""

import lab
import torch
import torch.distributed as dist
from snapshotd_client import Snapshotter  # snapshotd
from torch.nn.parallel import DistributedDataParallel

args = lab.arguments()
dist.init_process_group("gloo")
lab.seed()
# DDP reorders its buckets after the first backward of a process. With three ranks or more that changes the order in
# which gradients are summed, so a restarted run differs in the last bit, whoever restores it. find_unused_parameters
# keeps the order.
model = DistributedDataParallel(lab.build_model(args), find_unused_parameters=dist.get_world_size() > 2)
optimizers = lab.build_optimizers(args, model)
scheduler = lab.build_scheduler(args, optimizers[0])
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5, enabled=args.amp)
position = lab.Position()
torch.manual_seed(lab.SEED + dist.get_rank())  # dropout differs between ranks
notes = lab.Notes(model, optimizers, {"scheduler": scheduler, "scaler": scaler, "position": position})
extra = {"data": position}

snap = Snapshotter(model=model, optimizer=optimizers, scheduler=scheduler, scaler=scaler, extra=extra)  # snapshotd
first = snap.restore()  # snapshotd
notes.restored(first)
for step, batch in zip(range(first, args.steps), lab.batches(args, position), strict=False):
    loss = lab.loss_of(args, model, batch)
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    position.batch += 1
    notes.step(step, loss)
    snap.capture(step)  # snapshotd
    notes.hold(step)
notes.finish()
dist.destroy_process_group()
