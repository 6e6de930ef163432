"""What a policy looks at, and what its captions have to do with what it was shown. No Ray.

attribution   how much of a caption's loss hangs on each modality        docs/equations.md 9
pca           directions of largest variance, one fit for several sets   docs/equations.md 11
correlation   between captions and each modality's state                 docs/equations.md 17
states        prompts and captions through the policy, and what the three above are computed of
heat_map      image tokens back to their places in the picture
"""
