"""The letters of tensor shapes, and what each counts. Capitals are logical (global) sizes, whatever is sharded.

B  sequences of a microbatch          S  latents of a sequence (positions of the Atto)
H  width of the Atto                  D  width of a local model (byte Preludio and Coda)
A  attention heads                    K  size of a head
G  key/value heads                    X  rotary axes: document, t, y, x
U  text symbols of a microbatch       P  text patches of a microbatch
N  media patches of a microbatch      J  media spans of a microbatch
F  scalars of a media patch           C  channels of an autoencoder's latent
Q  rows that enter a media Preludio   R  router questions of a microbatch
M  modalities (text first)            V  byte vocabulary: 256 bytes, <end>, <mask>, <begin>
W  window of local attention          E  documents of a microbatch
T  pieces of a vocabulary, and <end>; or the different times of a microbatch
K  blocks of trees that are asked whether they split (elsewhere: size of a head)
"""

NUM_AXES = 4
TIME_WAVES = 128  # frequencies of t, a sine and a cosine each; and the hidden row of a modulation
ATTO_PARTS = 6  # shift, scale and gate of the attention branch and of the feed-forward branch
TREE_WIDTH = 64  # hidden row of the head that predicts trees
REACH = 3  # cells of a kernel along each axis
END, MASK, BEGIN = 256, 257, 258
NUM_SYMBOLS = 259
NUM_TARGETS = 257
