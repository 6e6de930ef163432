"""What a policy looks at, and how its captions depend on what it was shown. No Ray.

attribution   states of captions inside a policy, and the importance of each modality   docs/equations.md 9
pca           directions of largest variance, one fit for several sets                  docs/equations.md 11
correlation   between captions and each modality's state                                docs/equations.md 17
"""
