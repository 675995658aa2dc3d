/* prefgpt in one file of C99: SFT, a reward model, PPO and DPO on a GPT-2, trained from a seed.

       cc -std=c99 -O3 -o prefgpt prefgpt.c -lm && ./prefgpt rows.txt run.json

   It reads rows of token ids, trains all stages from the seed 0, with no weight or random number
   from elsewhere, and prints its numbers beside those of the Python scripts (run.json). README.md
   has the formulas, and trace.c compares the functions below with the golden trace.
   A row, which is a prompt and its response, is computed alone, one position after the other: no
   batch dimension, no padding, no mask. With p ids of the prompt and n in all, the positions
   p-1 .. n-2 predict the response. Keys and values stay where they are: sampling needs no cache.
   In a function that goes back, d is the slope of the loss in what the forward function computed,
   and dz that in its input z. Slopes in weights are added up in the gradient g.
   Letters: V words, S positions at most, L layers, H heads, C channels, D = C / H per head. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>     /* exp(x) means expf(x) where x is a float */

#ifndef real
#define real float      /* or double: cc -Dreal=double */
#endif

/* The largest sizes of any model here, so that most arrays need not be allocated */
enum { MAX_V = 768, MAX_S = 128, MAX_L = 2, MAX_H = 4, MAX_C = 64, MAX_ROWS = 256 };
static const double PI = 3.14159265358979323846;
#define RESPONSE(t, row) for (int t = (row).p - 1; t < (row).n - 1; t++)     /* predict its ids */
/* ------------------------------------------------------------------------------ random numbers */
typedef struct { uint32_t state[624]; int next; } Random;      /* MT19937, as in torch and numpy */
static Random seeded(uint32_t seed) {
    Random r = {.state = {seed}, .next = 624};
    for (uint32_t i = 1; i < 624; i++)
        r.state[i] = 1812433253u * (r.state[i - 1] ^ r.state[i - 1] >> 30) + i;
    return r;
}

static uint32_t number(Random *r) {
    if (r->next == 624) for (int i = r->next = 0; i < 624; i++) {
        uint32_t y = (r->state[i] & 0x80000000u) | (r->state[(i + 1) % 624] & 0x7fffffffu);
        r->state[i] = r->state[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    uint32_t y = r->state[r->next++];
    y ^= y >> 11, y ^= y << 7 & 0x9d2c5680u, y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }
static void swap(int *a, int *b) { int kept = *a; *a = *b, *b = kept; }

/* Returns the generator of one purpose in one step. Its seed is the start of the SHA-256 of
   "SEED STEP PURPOSE", four bytes, little-endian. So short a text fits into one block. */
static Random stream(int seed, int step, const char *purpose) {
    char text[56];
    int length = snprintf(text, sizeof text, "%d %d %s", seed, step, purpose);
    uint32_t w[64] = {0}, k[64], h[8];
    text[length] = (char)0x80;                  /* ends the text; then zeros, and its bits' count */
    for (int i = 0; i <= length; i++) w[i / 4] |= (uint32_t)(uint8_t)text[i] << (24 - i % 4 * 8);
    w[15] = 8 * length;
    for (int n = 0, p = 2, q; n < 64; p++) {    /* of the roots of the first 64 primes p: 32 bits */
        for (q = 2; p % q; q++);                /* after the point */
        if (q < p) continue;
        if (n < 8) h[n] = fmod(sqrt((double)p), 1) * 4294967296.0;
        k[n++] = fmod(cbrt((double)p), 1) * 4294967296.0;
    }
    uint32_t first = h[0];
    for (int i = 0; i < 64; i++) {
        uint32_t a = h[0], e = h[4], f = w[i > 15 ? i - 15 : 0], g = w[i > 15 ? i - 2 : 0];
        if (i > 15) w[i] = w[i - 16] + (rotate(f, 7) ^ rotate(f, 18) ^ f >> 3) + w[i - 7]
                           + (rotate(g, 17) ^ rotate(g, 19) ^ g >> 10);
        uint32_t one = h[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25))
                       + ((e & h[5]) ^ (~e & h[6])) + k[i] + w[i];
        uint32_t two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22))
                       + ((a & h[1]) ^ (a & h[2]) ^ (h[1] & h[2]));
        memmove(h + 1, h, 7 * sizeof *h);
        h[0] = one + two, h[4] += one;
    }
    first += h[0];                                      /* its four bytes, the highest in front: */
    return seeded(first >> 24 | (first >> 8 & 0xff00) | (first << 8 & 0xff0000) | first << 24);
}

/* Returns a uniform number in [0, 1): 24 bits, as many as a float holds. */
static float uniform(Random *r) { return (number(r) & 0xffffff) / 16777216.0f; }

static void permutation(Random *r, int *order, int n) {
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = 0; i < n - 1; i++) swap(&order[i], &order[i + number(r) % (n - i)]);
}

/* Fills z with normal numbers: Box and Muller's formula on pairs that are 8 apart. 16 divides n. */
static void normal(Random *r, real *z, int n, double std) {
    for (int i = 0; i < n; i++) z[i] = uniform(r);
    for (int i = 0; i < n; i += i % 16 == 7 ? 9 : 1) {              /* 0 .. 7, 16 .. 23, ... */
        double radius = std * sqrt(-2 * log(1.0 - z[i])), angle = 2 * PI * z[i + 8];
        z[i] = radius * cos(angle), z[i + 8] = radius * sin(angle);
    }
}
/* ----------------------------------------------------------------------------------- the model */
/* Columns 0: a vector. Beside the weights w are the gradient g and AdamW's moments m and v. */
typedef struct { int rows, columns, size; real *w, *g, *m, *v; } Tensor;
/* A policy or, with a score as its last tensor, a reward or value model. */
typedef struct { int V, S, L, H, C, tensors, steps; Tensor tensor[4 + 12 * MAX_L + 1]; } Model;

/* Indices of tensors. A layer's are counted from 12 l, and a bias follows its weight. */
enum { WTE, WPE, LN_1, ATTN = 4, ATTN_PROJ = 6, LN_2 = 8, FC = 10, MLP_PROJ = 12 };
static int LN_F(const Model *m) { return 2 + 12 * m->L; }
static int SCORE(const Model *m) { return 4 + 12 * m->L; }

static void add_tensor(Model *m, int rows, int columns) {
    int n = rows * (columns ? columns : 1);
    real *w = calloc(4 * n, sizeof *w);
    m->tensor[m->tensors++] = (Tensor){rows, columns, n, w, w + n, w + 2 * n, w + 3 * n};
}

static Model new_model(int V, int S, int L, int H, int C, int scalar) {
    const int rows[] = {C, 3 * C, C, C, 4 * C, C}, columns[] = {0, C, C, 0, C, 4 * C};
    Model m = {V, S, L, H, C, .tensors = 0};
    add_tensor(&m, V, C), add_tensor(&m, S, C);
    for (int i = 0; i < 6 * L; i++)
        add_tensor(&m, rows[i % 6], columns[i % 6]), add_tensor(&m, rows[i % 6], 0);
    add_tensor(&m, C, 0), add_tensor(&m, C, 0);
    if (scalar) add_tensor(&m, 1, C);
    return m;
}

/* Returns a new model with the weights of another; a score that the other has not is 0. */
static Model copy_of(const Model *from, int scalar) {
    Model m = new_model(from->V, from->S, from->L, from->H, from->C, scalar);
    for (int k = 0; k < m.tensors && k < from->tensors; k++)
        memcpy(m.tensor[k].w, from->tensor[k].w, m.tensor[k].size * sizeof(real));
    return m;
}

/* Sets a policy's initial weights: matrices normal, LayerNorms' weights 1 (LN_F is of kind LN_1),
   biases 0. What is added to the residual stream, 2 L times, is made smaller. */
static void initialize(Model *m, int seed, double std) {
    Random r = seeded(seed);
    int thrown_away = (m->V + m->S) * m->C + m->L * (12 * m->C + 9) * m->C;
    while (thrown_away--) number(&r);           /* torch sets every layer's weights twice */
    for (int k = 0; k < m->tensors; k++) {
        int kind = k < 2 ? k : (k - 2) % 12 + 2, added = kind == ATTN_PROJ || kind == MLP_PROJ;
        Tensor *t = &m->tensor[k];
        if (t->columns) normal(&r, t->w, t->size, added ? std / sqrt(2.0 * m->L) : std);
        if (kind == LN_1 || kind == LN_2) for (int i = 0; i < t->size; i++) t->w[i] = 1;
    }
}
/* ---------------------------------------------------------------------------------- the layers */
/* Adds up 8 sums, because a processor can do so at once. */
static real dot(const real *a, const real *b, int n) {
    real sum[8] = {0};
    for (int i = 0; i < n; i += 8) for (int j = 0; j < 8; j++) sum[j] += a[i + j] * b[i + j];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

static void add_scaled(real *restrict out, real scale, const real *restrict z, int n) {
    for (int i = 0; i < n; i++) out[i] += scale * z[i];
}

/* t is the weight, and t[1] its bias. */
static void linear(real *out, const real *z, const Tensor *t) {
    for (int o = 0; o < t->rows; o++)
        out[o] = t[1].w[o] + dot(t->w + o * t->columns, z, t->columns);
}

/* out[o] = bias[o] + sum over i of weight[o][i] z[i]: weight[o][i] has the slope d[o] z[i], and
   z[i] collects d[o] weight[o][i] from every o. */
static void linear_back(real *dz, const real *d, const real *z, const Tensor *t) {
    memset(dz, 0, t->columns * sizeof *dz);
    for (int o = 0; o < t->rows; o++) {
        add_scaled(dz, d[o], t->w + o * t->columns, t->columns);
        add_scaled(t->g + o * t->columns, d[o], z, t->columns);
        t[1].g[o] += d[o];
    }
}

/* Returns sqrt(var + 1e-5), by which it divides z - mean. */
static real standardize(real *out, const real *z, int C) {
    real mean = 0, var = 0;
    for (int c = 0; c < C; c++) mean += z[c] / C;
    for (int c = 0; c < C; c++) var += (z[c] - mean) * (z[c] - mean) / C;
    real root = sqrt(var + (real)1e-5);
    for (int c = 0; c < C; c++) out[c] = (z[c] - mean) / root;
    return root;
}

static void norm(real *out, const real *z, const Tensor *t) {
    standardize(out, z, t->rows);
    for (int c = 0; c < t->rows; c++) out[c] = out[c] * t->w[c] + t[1].w[c];
}

/* out = n weight + bias with n = (z - mean) / root, so n has the slope e = d weight. Shifting or
   scaling z leaves n as it is, so dz has no part along (1, ..., 1) or along n: subtract these parts
   of e, mean(e) and n mean(e n), and divide by root. ADDS to dz. */
static void norm_back(real *dz, const real *d, const real *z, const Tensor *t) {
    int C = t->rows;
    real n[MAX_C], root = standardize(n, z, C), mean_e = 0, mean_en = 0;
    for (int c = 0; c < C; c++) {
        t->g[c] += d[c] * n[c], t[1].g[c] += d[c];
        mean_e += d[c] * t->w[c] / C;
        mean_en += d[c] * t->w[c] * n[c] / C;
    }
    for (int c = 0; c < C; c++) dz[c] += (d[c] * t->w[c] - mean_e - n[c] * mean_en) / root;
}

/* The slope is the product rule on z/2 (1 + t), with tanh' = 1 - tanh^2. */
static real gelu(real z, real *slope) {
    const real scale = 0.79788456080286536, cube = 0.044715;        /* scale = sqrt(2 / pi) */
    real t = tanh(scale * (z + cube * z * z * z));
    *slope = (1 + t) / 2 + z / 2 * (1 - t * t) * scale * (1 + 3 * cube * z * z);
    return z / 2 * (1 + t);
}

/* Turns z into its softmax and returns log sum exp z; without the largest z, exp would overflow. */
static real softmax(real *z, int n) {
    real largest = z[0], sum = 0;
    for (int i = 1; i < n; i++) largest = fmax(largest, z[i]);
    for (int i = 0; i < n; i++) sum += z[i] = exp(z[i] - largest);
    for (int i = 0; i < n; i++) z[i] /= sum;
    return largest + log(sum);
}

/* What a layer computes at each position, and what the whole model does. */
typedef struct {
    real in[MAX_S][MAX_C], ln_1[MAX_S][MAX_C], qkv[MAX_S][3 * MAX_C], a[MAX_H][MAX_S][MAX_S];
    real heads[MAX_S][MAX_C], attention[MAX_S][MAX_C], middle[MAX_S][MAX_C], ln_2[MAX_S][MAX_C];
    real fc[MAX_S][4 * MAX_C], gelu[MAX_S][4 * MAX_C], mlp[MAX_S][MAX_C];
} Layer;
typedef struct { Layer layer[MAX_L + 1]; real hidden[MAX_S][MAX_C]; } Pass;

/* Position t looks at the positions s <= t and at no later one: that makes the model causal. */
static void attention(Layer *z, int t, int C, int D) {
    memset(z->heads[t], 0, C * sizeof(real));
    for (int c = 0; c < C; c += D) {                    /* c: a head's first channel */
        real *a = z->a[c / D][t];
        for (int s = 0; s <= t; s++) a[s] = dot(z->qkv[t] + c, z->qkv[s] + C + c, D) / sqrt(D);
        softmax(a, t + 1);
        for (int s = 0; s <= t; s++) add_scaled(z->heads[t] + c, a[s], z->qkv[s] + 2 * C + c, D);
    }
}

/* heads = sum over s of a[s] v[s], so da[s] = d v[s] and dv[s] = a[s] d. a = softmax(w) has the
   slopes da[s] / dw[r] = a[s] ((s == r) - a[r]), so dw[s] = a[s] (da[s] - sum of a da). Then
   w[s] = q k[s] / sqrt(D) gives dq = sum of dw[s] k[s] / sqrt(D) and dk[s] = dw[s] q / sqrt(D). */
static void attention_back(real dqkv[][3 * MAX_C], real d[][MAX_C], const Layer *z, int T, int C,
                           int D) {
    memset(dqkv, 0, T * sizeof *dqkv);
    for (int t = 0; t < T; t++) for (int c = 0; c < C; c += D) {
        const real *a = z->a[c / D][t];
        real da[MAX_S], sum = 0;
        for (int s = 0; s <= t; s++) {
            da[s] = dot(d[t] + c, z->qkv[s] + 2 * C + c, D);
            sum += a[s] * da[s];
            add_scaled(dqkv[s] + 2 * C + c, a[s], d[t] + c, D);
        }
        for (int s = 0; s <= t; s++) {
            real dw = a[s] * (da[s] - sum) / sqrt(D);
            add_scaled(dqkv[t] + c, dw, z->qkv[s] + C + c, D);
            add_scaled(dqkv[s] + C + c, dw, z->qkv[t] + c, D);
        }
    }
}

/* Computes the positions from .. to - 1 of the ids x; z has the earlier ones already. */
static void forward(const Model *m, Pass *z, const int *x, int from, int to) {
    int C = m->C;
    real slope;
    for (int t = from; t < to; t++) {
        for (int c = 0; c < C; c++)
            z->layer[0].in[t][c] = m->tensor[WTE].w[x[t] * C + c] + m->tensor[WPE].w[t * C + c];
        for (int l = 0; l < m->L; l++) {
            const Tensor *w = m->tensor + 12 * l;
            Layer *y = &z->layer[l];
            norm(y->ln_1[t], y->in[t], w + LN_1);
            linear(y->qkv[t], y->ln_1[t], w + ATTN);
            attention(y, t, C, C / m->H);
            linear(y->attention[t], y->heads[t], w + ATTN_PROJ);
            for (int c = 0; c < C; c++) y->middle[t][c] = y->in[t][c] + y->attention[t][c];
            norm(y->ln_2[t], y->middle[t], w + LN_2);
            linear(y->fc[t], y->ln_2[t], w + FC);
            for (int c = 0; c < 4 * C; c++) y->gelu[t][c] = gelu(y->fc[t][c], &slope);
            linear(y->mlp[t], y->gelu[t], w + MLP_PROJ);
            for (int c = 0; c < C; c++) y[1].in[t][c] = y->middle[t][c] + y->mlp[t][c];
        }
        norm(z->hidden[t], z->layer[m->L].in[t], m->tensor + LN_F(m));
    }
}

/* Goes back from d_hidden. d, the slope in the residual stream, goes on unchanged, and each branch
   (MLP, attention) adds the slope that comes back through it. */
static void backward(const Model *m, const Pass *z, const int *x, int T, real d_hidden[][MAX_C]) {
    real d[MAX_S][MAX_C] = {{0}}, d_heads[MAX_S][MAX_C], dqkv[MAX_S][3 * MAX_C];
    real wide[4 * MAX_C], narrow[MAX_C], slope;
    for (int t = 0; t < T; t++)
        norm_back(d[t], d_hidden[t], z->layer[m->L].in[t], m->tensor + LN_F(m));
    for (int l = m->L - 1; l >= 0; l--) {
        const Tensor *w = m->tensor + 12 * l;
        const Layer *y = &z->layer[l];
        for (int t = 0; t < T; t++) {
            linear_back(wide, d[t], y->gelu[t], w + MLP_PROJ);
            for (int c = 0; c < 4 * m->C; c++) gelu(y->fc[t][c], &slope), wide[c] *= slope;
            linear_back(narrow, wide, y->ln_2[t], w + FC);
            norm_back(d[t], narrow, y->middle[t], w + LN_2);
            linear_back(d_heads[t], d[t], y->heads[t], w + ATTN_PROJ);
        }
        attention_back(dqkv, d_heads, y, T, m->C, m->C / m->H);
        for (int t = 0; t < T; t++) {
            linear_back(narrow, dqkv[t], y->ln_1[t], w + ATTN);
            norm_back(d[t], narrow, y->in[t], w + LN_1);
        }
    }
    for (int t = 0; t < T; t++) {
        add_scaled(m->tensor[WTE].g + x[t] * m->C, 1, d[t], m->C);
        add_scaled(m->tensor[WPE].g + t * m->C, 1, d[t], m->C);
    }
}
/* ------------------------------------------------------------------------- logprobs and scores */
/* p ids of the prompt, n in all; ref is the logprob of the response under DPO's reference */
typedef struct { int id[MAX_S + 1], p, n; double ref; } Row;
static Pass pass;                                       /* of the row at hand */

/* Fills probability with the softmax over the words at position t; returns log p(y). */
static real log_softmax(const Model *m, int t, real temperature, int y, real *probability) {
    for (int v = 0; v < m->V; v++)
        probability[v] = dot(pass.hidden[t], m->tensor[WTE].w + v * m->C, m->C) / temperature;
    real logit = probability[y];
    return logit - softmax(probability, m->V);
}

/* Fills logprob at the positions that predict a row's response; returns their sum. */
static double logprobs(const Model *m, const Row *row, real temperature, real *logprob) {
    real probability[MAX_V];
    double sum = 0;
    forward(m, &pass, row->id, 0, row->n - 1);
    RESPONSE(t, *row)
        sum += logprob[t] = log_softmax(m, t, temperature, row->id[t + 1], probability);
    return sum;
}

/* Goes back from the slopes d in a row's logprobs; returns their sum again. As logprob = logit[y] -
   log sum exp logit with logit = wte hidden / temperature, logit[v] has the slope
   d ((v == y) - probability[v]). wte gets slopes here and as the embedding of the ids. */
static double logprobs_back(const Model *m, const Row *row, real temperature, const real *d) {
    real probability[MAX_V], d_hidden[MAX_S][MAX_C] = {{0}};
    double sum = 0;
    forward(m, &pass, row->id, 0, row->n - 1);          /* again: pass may hold another row */
    RESPONSE(t, *row) {
        sum += log_softmax(m, t, temperature, row->id[t + 1], probability);
        for (int v = 0; v < m->V; v++) {
            real d_logit = d[t] * ((v == row->id[t + 1]) - probability[v]) / temperature;
            add_scaled(d_hidden[t], d_logit, m->tensor[WTE].w + v * m->C, m->C);
            add_scaled(m->tensor[WTE].g + v * m->C, d_logit, pass.hidden[t], m->C);
        }
    }
    backward(m, &pass, row->id, row->n - 1, d_hidden);
    return sum;
}

/* Fills out with a scalar model's numbers, scores or values, at the first T positions of a row;
   returns the last of them. A score is the number at the response's last id, so there T is n. */
static real numbers(const Model *m, const Row *row, int T, real *out) {
    forward(m, &pass, row->id, 0, T);
    for (int t = 0; t < T; t++) out[t] = dot(pass.hidden[t], m->tensor[SCORE(m)].w, m->C);
    return out[T - 1];
}
static real score(const Model *m, const Row *r) { return numbers(m, r, r->n, (real[MAX_S]){0}); }

/* Goes back from the slopes d in these numbers. */
static void numbers_back(const Model *m, const Row *row, int T, const real *d) {
    real d_hidden[MAX_S][MAX_C] = {{0}};
    forward(m, &pass, row->id, 0, T);
    for (int t = 0; t < T; t++) {
        add_scaled(d_hidden[t], d[t], m->tensor[SCORE(m)].w, m->C);
        add_scaled(m->tensor[SCORE(m)].g, d[t], pass.hidden[t], m->C);
    }
    backward(m, &pass, row->id, T, d_hidden);
}

/* Draws the first word whose cumulative probability exceeds u; their sum is 1 but for rounding. */
static int draw(const real *probability, int V, real u) {
    real sum = 0, total = 0;
    for (int v = 0; v < V; v++) total += probability[v];
    for (int v = 0; v < V; v++) if ((sum += probability[v]) > u * total) return v;
    return V - 1;
}

/* Appends a response of at most so many ids to a row's prompt, with a uniform number u for each. */
static void respond(const Model *m, Row *row, int eos, int most, real temperature, const real *u) {
    real probability[MAX_V];
    int id = -1;
    for (row->n = row->p; row->n < row->p + most && id != eos; row->n++) {
        forward(m, &pass, row->id, row->n == row->p ? 0 : row->n - 1, row->n);
        log_softmax(m, row->n - 1, temperature, 0, probability);
        row->id[row->n] = id = draw(probability, m->V, u[row->n - row->p]);
    }
}
/* ----------------------------------------------------------------------- optimizer and batches */
static struct {         /* what optimizer and methods are given; every stage sets its own */
    double weight_decay, grad_clip, adam_eps, beta, label_smoothing, temperature, no_eos_score;
    double gamma, gae_lambda, clip_eps, vf_clip, ipo;
} set;

/* Clips the gradient, takes a step of AdamW and empties the gradient; returns its norm before. */
static double step(Model *m, double rate) {
    double norm = 0, first = 1 - pow(0.9, ++m->steps), second = 1 - pow(0.95, m->steps);
    for (const Tensor *t = m->tensor; t < m->tensor + m->tensors; t++)
        for (int i = 0; i < t->size; i++) norm += (double)t->g[i] * t->g[i];
    norm = sqrt(norm);
    for (const Tensor *t = m->tensor; t < m->tensor + m->tensors; t++)
        for (int i = 0; i < t->size; i++) {
            real g = fmin(1, set.grad_clip / (norm + 1e-6)) * t->g[i];
            t->m[i] = (real)0.9 * t->m[i] + (real)0.1 * g;
            t->v[i] = (real)0.95 * t->v[i] + (real)0.05 * g * g;
            if (t->columns) t->w[i] -= rate * set.weight_decay * t->w[i];   /* matrices alone */
            t->w[i] -= rate * (t->m[i] / first) / (sqrt(t->v[i] / second) + set.adam_eps);
            t->g[i] = 0;
        }
    return norm;
}

/* Returns the rate of step s of n: linear warm-up, then a cosine to a tenth of the peak. */
static double rate(int s, int n, double peak, int warmup) {
    if (s < warmup) return peak * (s + 1) / warmup;
    return peak * (0.1 + 0.9 * (1 + cos(PI * (s - warmup) / fmax(1, n - 1 - warmup))) / 2);
}

/* Copies part i of k of n indices; the sizes are as even as can be, the larger ones first. */
static int part(const int *all, int n, int k, int i, int *out) {
    int size = n / k + (i < n % k), start = i * (n / k) + (i < n % k ? i : n % k);
    memcpy(out, all + start, size * sizeof *out);
    return size;
}

/* Fills indices with the rows of the batch of step s = 0, 1, ...; returns how many there are. */
static int batch(int seed, const int *length, int rows, int size, int s, int *indices) {
    int per_epoch = (rows + size - 1) / size, order[MAX_ROWS], visits[MAX_ROWS];
    Random r = stream(seed, s / per_epoch, "batch");
    permutation(&r, order, rows);
    for (int i = 0; i < rows; i++)          /* a stable sort by length within each 16 batches */
        for (int j = i; j % (16 * size) && length[order[j]] < length[order[j - 1]]; j--)
            swap(&order[j], &order[j - 1]);
    permutation(&r, visits, per_epoch);
    return part(order, rows, per_epoch, visits[s % per_epoch], indices);
}
/* --------------------------------------------------------------------------------- the methods
   Each adds the gradient of one example and returns its loss, both times a weight: 1 / the number
   of pairs in the batch or, in SFT and PPO, 1 / the number of its response ids. */
static int response(const Row *row) { return row->n - row->p; }     /* its length */

/* Goes back from the same slope d in all logprobs of a response; returns their sum. */
static double sum_back(const Model *policy, const Row *row, double d) {
    real slopes[MAX_S];
    for (int t = 0; t < MAX_S; t++) slopes[t] = d;
    return logprobs_back(policy, row, 1, slopes);
}

/* SFT: - logprob. */
static double sft(const Model *policy, const Row *row, double weight) {
    return -weight * sum_back(policy, row, -weight);
}

/* log(1 / (1 + e^-z)), of which sigmoid(-z) is the slope; this exp cannot overflow. */
static double log_sigmoid(double z) { return fmin(z, 0) - log1p(exp(-fabs(z))); }
static double sigmoid(double z) { return exp(log_sigmoid(z)); }

/* Reward model (Bradley and Terry): - log sigmoid(chosen's score - rejected's score). */
static double rm(const Model *m, const Row *pair, double weight) {
    const Row *chosen = pair, *rejected = pair + 1;
    double margin = score(m, chosen) - score(m, rejected), slope = sigmoid(-margin) * weight;
    real up[MAX_S] = {0}, down[MAX_S] = {0};
    up[chosen->n - 1] = -slope, down[rejected->n - 1] = slope;
    numbers_back(m, chosen, chosen->n, up);
    numbers_back(m, rejected, rejected->n, down);
    return -log_sigmoid(margin) * weight;
}

/* DPO: - log sigmoid(beta h); h is how much more the policy prefers chosen than the reference does.
   With smoothing e, a label is correct with probability 1 - e. IPO pulls h to 1 / (2 beta). Returns
   the loss; d is its slope in h. */
static double dpo_loss(double h, double *d) {
    double e = set.label_smoothing, margin = set.beta * h, gap = h - 1 / (2 * set.beta);
    *d = set.ipo ? 2 * gap : set.beta * (sigmoid(margin) - (1 - e));
    return set.ipo ? gap * gap : -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin);
}

/* h has the slope 1 in the chosen side's logprobs and -1 in the rejected side's. */
static double dpo(const Model *policy, const Row *pair, double weight) {
    real unused[MAX_S];
    double d, h = logprobs(policy, &pair[0], 1, unused) - pair[0].ref
                  - (logprobs(policy, &pair[1], 1, unused) - pair[1].ref);
    double loss = dpo_loss(h, &d);
    sum_back(policy, &pair[0], d * weight);
    sum_back(policy, &pair[1], -d * weight);
    return loss * weight;
}

/* PPO: a sampled row, with the numbers that stay the same in all passes over its rollout batch. */
typedef struct {
    Row row;
    int ended;
    real raw, logprob[MAX_S], ref_logprob[MAX_S], value[MAX_S];
    real reward[MAX_S], advantage[MAX_S], returns[MAX_S], white[MAX_S];
} Episode;

/* Scores a response; computes rewards and, from its end backwards, advantages (GAE) and returns. */
static void assess(Episode *e, const Model *policy, const Model *ref, const Model *reward_model,
                  double shift, const Model *value_model, int eos) {
    int last = e->row.n - 2;
    real next_value = 0, advantage = 0;
    logprobs(policy, &e->row, set.temperature, e->logprob);
    logprobs(ref, &e->row, set.temperature, e->ref_logprob);
    numbers(value_model, &e->row, last + 1, e->value);
    e->raw = score(reward_model, &e->row) - shift;
    e->ended = e->row.id[last + 1] == eos;
    for (int t = last; t >= e->row.p - 1; t--) {
        e->reward[t] = -set.beta * (e->logprob[t] - e->ref_logprob[t]);
        if (t == last) e->reward[t] += e->ended ? e->raw : fmin(e->raw, set.no_eos_score);
        advantage = e->reward[t] + set.gamma * next_value - e->value[t]
                    + set.gamma * set.gae_lambda * advantage;
        e->advantage[t] = advantage, e->returns[t] = advantage + e->value[t];
        next_value = e->value[t];
    }
}

/* Whitens the advantages over all response ids of the rollout batch. */
static void whiten(Episode *episodes, int size) {
    double mean = 0, var = 0;
    for (int round = 0, M = 0; round < 3; round++)
        for (Episode *e = episodes; e < episodes + size; e++)
            RESPONSE(t, e->row) {
                double gap = e->advantage[t] - mean;
                if (round == 0) mean += gap / ++M;      /* the mean of those so far */
                if (round == 1) var += gap * gap / M;
                if (round == 2) e->white[t] = gap / sqrt(var + 1e-8);
            }
}

/* Returns an id's clipped loss; d is its slope in the logprob: d ratio / d logprob = ratio. */
static double policy_loss(double logprob, double old_logprob, double advantage, double *d) {
    double ratio = exp(logprob - old_logprob), plain = -advantage * ratio;
    double clipped = -advantage * fmin(fmax(ratio, 1 - set.clip_eps), 1 + set.clip_eps);
    *d = plain >= clipped ? plain : 0;
    return fmax(plain, clipped);
}

/* Returns half the squared error or, if the value has moved by more than vf_clip (0: off), that of
   the value moved by vf_clip alone, should it be larger; d is the slope in the value. */
static double value_loss(double value, double old_value, double returns, double *d) {
    double error = value - returns, moved = value - old_value;
    double clipped = old_value + copysign(set.vf_clip, moved) - returns;
    int clip = set.vf_clip && fabs(moved) > set.vf_clip && clipped * clipped > error * error;
    *d = clip ? 0 : error;
    return (clip ? clipped * clipped : error * error) / 2;
}

static double ppo(const Model *policy, const Model *value_model, const Episode *e, double weight,
                  double *vf_loss) {
    real logprob[MAX_S], value[MAX_S], d_value[MAX_S] = {0};
    double pg_loss = 0, d;
    logprobs(policy, &e->row, set.temperature, logprob);
    numbers(value_model, &e->row, e->row.n - 1, value);
    RESPONSE(t, e->row) {
        pg_loss += policy_loss(logprob[t], e->logprob[t], e->white[t], &d) * weight;
        logprob[t] = d * weight;                        /* from here on, its slope */
        *vf_loss += value_loss(value[t], e->value[t], e->returns[t], &d) * weight;
        d_value[t] = d * weight;
    }
    logprobs_back(policy, &e->row, set.temperature, logprob);
    numbers_back(value_model, &e->row, e->row.n - 1, d_value);
    return pg_loss;
}
/* --------------------------------------------- the run: rows of rows.txt, numbers of run.json */
static FILE *rows_file, *run_file;
static int differences;
static int next_int(FILE *file) {
    int i;
    if (fscanf(file, "%*[^0-9]%d", &i) != 1) fprintf(stderr, "a file ends too early\n"), exit(2);
    return i;
}

/* Reads how many rows follow, and of each p, n and its ids. A pair is two rows. */
static int read_rows(Row *rows) {
    int count = next_int(rows_file);
    for (Row *row = rows; row < rows + count; row++) {
        row->p = next_int(rows_file), row->n = next_int(rows_file);
        for (int i = 0; i < row->n; i++) row->id[i] = next_int(rows_file);
    }
    return count;
}

static void find(const char *key) {                     /* goes on to the next such key */
    char word[64];
    while (fscanf(run_file, "%*[^\"]\"%63[^\"]\"", word) == 1 && strcmp(word, key));
}

static void compare(const char *key, double ours) {
    double theirs = NAN, most = strcmp(key, "shift") ? 1e-4 : 1e-3;
    find(key), fscanf(run_file, ": %lf", &theirs);
    int agrees = fabs(ours - theirs) <= most * fmax(1, fabs(theirs));
    differences += !agrees;
    printf(" %s %.5f (%.5f %s)", key, ours, theirs, agrees ? "agrees" : "DIFFERS");
}

static void compare_ids(const int *ids, int n) {        /* with the next n whole numbers */
    int differ = 0;
    for (int i = 0; i < n; i++) differ |= next_int(run_file) != ids[i];
    if (differ) differences++, printf(" ids DIFFER");
}

/* Trains by a method whose examples are rows (SFT) or two rows each, chosen and rejected. */
static void train(const char *stage, Model *m, double method(const Model *, const Row *, double),
                  int each, const Row *rows, int count, double peak) {
    int length[MAX_ROWS], indices[MAX_ROWS];
    for (int i = 0; i < count / each; i++)
        length[i] = rows[each * i].n + (each - 1) * rows[each * i + each - 1].n;
    for (int s = 0; s < 10; s++) {
        int size = batch(0, length, count / each, 8, s, indices), M = 0;
        double loss = 0;
        for (int i = 0; i < size; i++) M += each == 1 ? response(&rows[indices[i]]) : 1;
        for (int i = 0; i < size; i++) loss += method(m, &rows[each * indices[i]], 1.0 / M);
        printf("%s %d", stage, s + 1), find("rows"), compare_ids(indices, size);
        compare("loss", loss), compare("norm", step(m, rate(s, 10, peak, 3))), puts("");
    }
}

static void train_ppo(Model *policy, const Model *reward_model, double shift, const Row *prompts,
                      int rows) {
    enum { STEPS = 3, ROLLOUT = 16, PASSES = 2, MINIBATCH = 8, NEW = 24, EOS = MAX_V - 1 };
    static Episode episodes[ROLLOUT];
    Model ref = copy_of(policy, 0), value_model = copy_of(reward_model, 1);
    int lengths[MAX_ROWS] = {0}, indices[MAX_ROWS], order[ROLLOUT];     /* prompts are not sorted */
    memset(value_model.tensor[SCORE(policy)].w, 0, policy->C * sizeof(real));   /* no score yet */
    for (int s = 0; s < STEPS; s++) {
        int size = batch(0, lengths, rows, ROLLOUT, s, indices), updates = 0;
        int parts = (size + MINIBATCH - 1) / MINIBATCH;
        double score = 0, kl = 0, pg_loss = 0, vf_loss = 0, norm = 0;
        Random r = stream(0, s, "rollout");
        printf("ppo %d", s + 1), find("rows"), compare_ids(indices, size), find("ids");
        for (int b = 0; b < size; b++) {
            Episode *e = &episodes[b];
            real u[NEW];
            for (int i = 0; i < NEW; i++) u[i] = uniform(&r);
            e->row = prompts[indices[b]];
            respond(policy, &e->row, EOS, NEW, set.temperature, u);
            assess(e, policy, &ref, reward_model, shift, &value_model, EOS);
            compare_ids(e->row.id + e->row.p, response(&e->row));
            score += e->raw / size;
            RESPONSE(t, e->row) kl += (e->logprob[t] - e->ref_logprob[t]) / size;
        }
        whiten(episodes, size);
        for (int k = 0; k < PASSES * parts; k++, updates++) {           /* a part of a pass each */
            r = stream(0, s * PASSES + k / parts, "shuffle");
            permutation(&r, order, size);
            int n = part(order, size, parts, k % parts, indices), M = 0;
            for (int i = 0; i < n; i++) M += response(&episodes[indices[i]].row);
            for (int i = 0; i < n; i++)
                pg_loss += ppo(policy, &value_model, &episodes[indices[i]], 1.0 / M, &vf_loss);
            norm += step(policy, rate(s, STEPS, 3e-3, 1));
            step(&value_model, rate(s, STEPS, 2e-3, 1));
        }
        for (int k = 0; k < ref.tensors; k++) for (int i = 0; i < ref.tensor[k].size; i++) /* EMA */
            ref.tensor[k].w[i] += 0.1 * (policy->tensor[k].w[i] - ref.tensor[k].w[i]);
        compare("score", score), compare("kl", kl), compare("pg_loss", pg_loss / updates);
        compare("vf_loss", vf_loss / updates), compare("norm", norm / updates), puts("");
    }
}

int main(int count, char **names) {
    enum { SFT, HELD_OUT, PAIRS, HELD_OUT_PAIRS, PROMPTS, FILES };
    static Row rows[FILES][MAX_ROWS];
    int n[FILES], M = 0;
    double loss = 0, shift = 0;
    if (count < 3 || !(rows_file = fopen(names[1], "r")) || !(run_file = fopen(names[2], "r")))
        return fprintf(stderr, "usage: %s rows.txt run.json\n", names[0]), 2;
    for (int k = 0; k < FILES; k++) n[k] = read_rows(rows[k]);

    set.weight_decay = 0.1, set.grad_clip = 1, set.adam_eps = 1e-8;
    Model policy = new_model(MAX_V, MAX_S, MAX_L, MAX_H, MAX_C, 0);
    initialize(&policy, 0, 0.1);
    train("sft", &policy, sft, 1, rows[SFT], n[SFT], 6e-3);
    for (const Row *row = rows[HELD_OUT]; row < rows[HELD_OUT] + n[HELD_OUT]; row++)
        loss -= logprobs(&policy, row, 1, (real[MAX_S]){0}), M += response(row);
    compare("eval_loss", loss / M), puts("");

    Model reward_model = copy_of(&policy, 1);
    train("rm", &reward_model, rm, 2, rows[PAIRS], n[PAIRS], 3e-3);
    for (int i = 0; i < n[HELD_OUT_PAIRS]; i++)         /* the mean of both sides' scores */
        shift += score(&reward_model, &rows[HELD_OUT_PAIRS][i]) / n[HELD_OUT_PAIRS];
    compare("shift", shift), puts("");

    set.weight_decay = 0, set.beta = 0.2;
    Model dpo_policy = copy_of(&policy, 0), ppo_policy = copy_of(&policy, 0);
    for (Row *row = rows[PAIRS]; row < rows[PAIRS] + n[PAIRS]; row++)
        row->ref = logprobs(&policy, row, 1, (real[MAX_S]){0});
    train("dpo", &dpo_policy, dpo, 2, rows[PAIRS], n[PAIRS], 1e-3);

    set.adam_eps = 1e-5, set.temperature = 0.9, set.no_eos_score = -1, set.gamma = 0.98;
    set.gae_lambda = 0.95, set.clip_eps = 0.2, set.vf_clip = 0.2;
    train_ppo(&ppo_policy, &reward_model, shift, rows[PROMPTS], n[PROMPTS]);
    printf(differences ? "%d numbers DIFFER\n" : "all numbers agree\n", differences);
    return differences > 0;
}
