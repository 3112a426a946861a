"""What scripts/pretrain_tiny_diffusion.py is made of, one idea a file.

The pictures and their captions are drawn by lorakit/reproduce/emoji, which `lorakit demo --image` uses too.

latents       the latent space: a fixed linear projection of 4 x 4 patches
tokenizer     a CLIP tokenizer in which every caption word is one token
autoencoder, denoiser, judge    what is trained, each with the loss of one step
loop          the training loop: resumable, with a running average of the weights
pipeline      a StableDiffusionPipeline folder from the checkpoints
evaluate      judge's table and a grid of samples
card          the model card
"""
