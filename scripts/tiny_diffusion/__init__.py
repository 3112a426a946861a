"""What scripts/pretrain_tiny_diffusion.py is made of, one idea a file.

captions      what a picture is called, and which pairs of object and background are never trained on
backgrounds   plain colours and drawn scenes
pictures      emoji pasted into them: the batch of a training step as a function of its number
styles        pictures as ink drawings, neon lines and in two colours, so that the autoencoder knows such pictures too
latents       the latent space: a fixed linear projection of 4 x 4 patches
tokenizer     a CLIP tokenizer in which every caption word is one token
autoencoder, denoiser, judge    what is trained, each with the loss of one step
loop          the training loop: resumable, with a running average of the weights
pipeline      a StableDiffusionPipeline folder from the checkpoints
evaluate      judge's table and a grid of samples
card          the model card
"""
