# Make the plots and numbers of "What do the alphas learn?" in lab/README.md.
#
#     sh lab/analysis.sh FOLDER > lab/analysis.txt
#
# FOLDER holds a train.txt and a val.txt. This script trains a 1x1 and a plain model as lab/compare.py
# does for seed 1, then prunes the 1x1 model and trains it further. It overwrites out-1x1, out-plain
# and out-1x1-*.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # two runs at a time

model="--dataset $1 --tokenizer byte --n_layer 24 --n_head 2 --n_embd 48 --block_size 128
       --batch_size 8 --optimizer adamw --dwa_lr_scale 1 --weight_decay 0.1 --dtype float32
       --final_eval_iters 1000000 --log_interval 500"
long="--max_iters 2000 --eval_interval 2000 --warmup_iters 200 --learning_rate 8e-3 --min_lr 8e-4"
short="--max_iters 400 --eval_interval 400 --warmup_iters 40 --learning_rate 2e-3"

python train.py $model $long --seed 1 --out_dir out-plain --overwrite --dwa none > /dev/null &
python train.py $model $long --seed 1 --out_dir out-1x1 --overwrite
wait
python -m lab.analyze --out_dir out-1x1 --plain out-plain --prune 0.8
for weights in pruned best; do
    python train.py $model $short --seed 7 --init_from out-1x1/$weights.pt \
        --out_dir out-1x1-$weights --overwrite
done
for plot in alpha alpha-steps cosine dropped singular; do
    cp out-1x1/$plot.png lab/
done
