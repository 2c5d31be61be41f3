import torch
from random import Random
from treg.demo import make_model as m, rumours as world
torch.set_num_threads(1); torch.manual_seed(0); rng=Random(0)
s=m.Settings(steps=world.STEPS)
tok=m.make_tokenizer(rng, world, s); model=m.make_model(tok, s)
class Stop(Exception): pass
n=0
def log(x):
    global n; print(x, flush=True); n+=1
    if n==2: raise Stop
try: m.train(model,tok,rng,world,s,log)
except Stop: pass
