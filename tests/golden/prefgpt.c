/*
 * prefgpt in one file of C99: SFT, a reward model, PPO and DPO on a GPT-2, trained from a seed.
 *
 *     cc -std=c99 -O3 -o prefgpt tests/golden/prefgpt.c -lm && ./prefgpt tests/golden
 *
 * It reads rows of token ids (rows.txt), trains all four stages from the seed 0, without a weight or
 * a random number from elsewhere, and prints its losses beside those of the Python scripts
 * (run.json). README.md has the formulas; trace.c compares the functions here with the golden trace.
 *
 * A row, which is a prompt and its response, is computed by itself, one position after the other: no
 * batch dimension, so no padding and no mask. With p ids of the prompt and n ids in all, the ids of
 * the response are predicted at the positions p-1 .. n-2. Keys and values of earlier positions stay
 * where they are, so sampling needs no other cache.
 *
 * In a function that goes back, d is the slope of the loss in what the forward function returned and
 * dz the slope in its input z. Slopes in weights are added up in the model's array g.
 *
 * Letters: V words, S positions at most, L layers, H heads of D = C / H channels, C channels.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tgmath.h>     /* exp(x) means expf(x) where x is a float */

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

/* The largest sizes of any model here, so that arrays need not be allocated */
enum { MAX_V = 768, MAX_S = 128, MAX_L = 2, MAX_H = 4, MAX_C = 64, MAX_ROWS = 256 };
static const double PI = 3.14159265358979323846;

static int min(int a, int b) { return a < b ? a : b; }

/* ------------------------------------------------------------------------------ random numbers */

typedef struct { uint32_t state[624]; int next; } Random;      /* MT19937, as in torch and numpy */

static Random seeded(uint32_t seed)
{
    Random r = {.state = {seed}, .next = 624};
    for (uint32_t i = 1; i < 624; i++)
        r.state[i] = 1812433253u * (r.state[i - 1] ^ r.state[i - 1] >> 30) + i;
    return r;
}

static uint32_t number(Random *r)
{
    if (r->next == 624)
        for (int i = r->next = 0; i < 624; i++) {
            uint32_t y = (r->state[i] & 0x80000000u) | (r->state[(i + 1) % 624] & 0x7fffffffu);
            r->state[i] = r->state[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
        }
    uint32_t y = r->state[r->next++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* Returns the generator of one purpose in one step. Its seed is the first four bytes, little-endian,
   of SHA-256 of "SEED STEP PURPOSE"; so short a text fits into one block of 64 bytes. */
static Random stream(int seed, int step, const char *purpose)
{
    char text[56];
    int length = snprintf(text, sizeof text, "%d %d %s", seed, step, purpose);
    uint32_t w[64] = {0}, k[64], h[8];
    text[length] = (char)0x80;                  /* ends the text; then zeros, then its count of bits */
    for (int i = 0; i <= length; i++) w[i / 4] |= (uint32_t)(uint8_t)text[i] << (24 - i % 4 * 8);
    w[15] = 8 * length;
    for (int n = 0, p = 2, q; n < 64; p++) {    /* of the roots of the first 64 primes p, the first */
        for (q = 2; p % q; q++);                /* 32 bits after the point */
        if (q < p) continue;
        if (n < 8) h[n] = fmod(sqrt((double)p), 1) * 4294967296.0;
        k[n++] = fmod(cbrt((double)p), 1) * 4294967296.0;
    }
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7]
               + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    uint32_t first = h[0];
    for (int i = 0; i < 64; i++) {
        uint32_t a = h[0], e = h[4];
        uint32_t one = h[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25))
                       + ((e & h[5]) ^ (~e & h[6])) + k[i] + w[i];
        uint32_t two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22))
                       + ((a & h[1]) ^ (a & h[2]) ^ (h[1] & h[2]));
        memmove(h + 1, h, 7 * sizeof *h);
        h[0] = one + two, h[4] += one;
    }
    first += h[0];                                      /* the four bytes, the highest in front */
    return seeded(first >> 24 | (first >> 8 & 0xff00) | (first << 8 & 0xff0000) | first << 24);
}

/* Returns a uniform number in [0, 1): 24 bits, as many as a float holds. */
static float uniform(Random *r) { return (number(r) & 0xffffff) / 16777216.0f; }

static void permutation(Random *r, int *order, int n)
{
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = 0; i < n - 1; i++) {
        int j = i + number(r) % (n - i), kept = order[i];
        order[i] = order[j], order[j] = kept;
    }
}

/* Fills z with n >= 16 normal numbers: Box and Muller's formula on pairs that are 8 apart. */
static void normal(Random *r, real *z, int n, double std)
{
    for (int i = 0; i < n; i++) z[i] = uniform(r);
    for (int i = 0; i < n; i += 16) {
        if (i + 16 > n)                                 /* the last 16 are drawn anew */
            for (int j = i = n - 16; j < n; j++) z[j] = uniform(r);
        for (int j = i; j < i + 8; j++) {
            double radius = std * sqrt(-2 * log(1.0 - z[j])), angle = 2 * PI * z[j + 8];
            z[j] = radius * cos(angle), z[j + 8] = radius * sin(angle);
        }
    }
}

/* ----------------------------------------------------------------------------------- the model */

typedef struct { char name[32]; int rows, columns; real *w, *g, *m, *v; } Tensor;

/* A policy or, with a score, a reward or value model. Weights w, gradients g and AdamW's m and v
   are four long arrays with the same layout; each tensor has its place in them. */
typedef struct {
    int V, S, L, H, C, size, steps, tensors;
    Tensor tensor[2 + 12 * MAX_L + 3];
    real *w, *g, *m, *v;
} Model;

/* Indices of tensors. A layer's are counted from 12 l; a bias follows its weight. */
enum { WTE, WPE, LN_1, ATTN = 4, ATTN_PROJ = 6, LN_2 = 8, FC = 10, MLP_PROJ = 12 };
static int LN_F(const Model *m) { return 2 + 12 * m->L; }
static const Tensor *score_of(const Model *m) { return &m->tensor[4 + 12 * m->L]; }

static Model new_model(int V, int S, int L, int H, int C, int scalar)
{
    const char *names[] = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"};
    const int rows[] = {C, 3 * C, C, C, 4 * C, C}, columns[] = {0, C, C, 0, C, 4 * C};
    Model m = {.V = V, .S = S, .L = L, .H = H, .C = C, .tensors = 4 + 12 * L + scalar};
    m.tensor[WTE] = (Tensor){"wte.weight", V, C};
    m.tensor[WPE] = (Tensor){"wpe.weight", S, C};
    for (int i = 0; i < 12 * L; i++) {                  /* columns 0: a vector */
        Tensor *t = &m.tensor[2 + i];
        int k = i % 12 / 2, bias = i % 2;
        snprintf(t->name, sizeof t->name, "h.%d.%s.%s", i / 12, names[k], bias ? "bias" : "weight");
        t->rows = rows[k], t->columns = bias ? 0 : columns[k];
    }
    m.tensor[LN_F(&m)] = (Tensor){"ln_f.weight", C, 0};
    m.tensor[LN_F(&m) + 1] = (Tensor){"ln_f.bias", C, 0};
    m.tensor[LN_F(&m) + 2] = (Tensor){"score.weight", 1, C};        /* 0 at first */
    m.size = (V + S + 2 + scalar) * C + L * (12 * C + 13) * C;
    m.w = calloc(4 * m.size, sizeof *m.w);
    m.g = m.w + m.size, m.m = m.g + m.size, m.v = m.m + m.size;
    for (int k = 0, at = 0; k < m.tensors; k++) {
        Tensor *t = &m.tensor[k];
        t->w = m.w + at, t->g = m.g + at, t->m = m.m + at, t->v = m.v + at;
        at += t->rows * (t->columns ? t->columns : 1);
    }
    return m;
}

/* Returns a new model with the weights of another one; a score that only it has stays 0. */
static Model copy_of(const Model *from, int scalar)
{
    Model m = new_model(from->V, from->S, from->L, from->H, from->C, scalar);
    memcpy(m.w, from->w, min(m.size, from->size) * sizeof *m.w);
    return m;
}

/* Sets the initial weights: matrices normal, LayerNorms' weights 1, biases 0. */
static void initialize(Model *m, int seed, double std)
{
    Random r = seeded(seed);
    int thrown_away = (m->V + m->S) * m->C + m->L * (12 * m->C + 9) * m->C;
    for (int i = 0; i < thrown_away; i++)       /* torch gives every layer weights at its creation */
        number(&r);
    for (int k = 0; k < m->tensors; k++) {
        Tensor *t = &m->tensor[k];
        /* 2 L products are added to the residual stream, so each is made smaller */
        double scale = strstr(t->name, "c_proj") ? 1 / sqrt(2.0 * m->L) : 1;
        if (t->columns)
            normal(&r, t->w, t->rows * t->columns, std * scale);
        else
            for (int i = 0; i < t->rows; i++)
                t->w[i] = strstr(t->name, "ln_") && strstr(t->name, "weight");
    }
}

/* ---------------------------------------------------------------------------------- the layers */

static real dot(const real *a, const real *b, int n)    /* 8 sums, which a processor adds at once */
{
    real sum[8] = {0};
    for (int i = 0; i < n; i += 8)
        for (int j = 0; j < 8; j++)
            sum[j] += a[i + j] * b[i + j];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

static void add_scaled(real *restrict out, real scale, const real *restrict z, int n)
{
    for (int i = 0; i < n; i++) out[i] += scale * z[i];
}

/* t is the weight, and t[1] its bias. */
static void linear(real *out, const real *z, const Tensor *t)
{
    for (int o = 0; o < t->rows; o++)
        out[o] = t[1].w[o] + dot(t->w + o * t->columns, z, t->columns);
}

/* out[o] = bias[o] + sum over i of weight[o][i] z[i]: weight[o][i] has the slope d[o] z[i], and z[i]
   collects d[o] weight[o][i] from every o. */
static void linear_back(real *dz, const real *d, const real *z, const Tensor *t)
{
    memset(dz, 0, t->columns * sizeof *dz);
    for (int o = 0; o < t->rows; o++) {
        add_scaled(dz, d[o], t->w + o * t->columns, t->columns);
        add_scaled(t->g + o * t->columns, d[o], z, t->columns);
        t[1].g[o] += d[o];
    }
}

/* Returns sqrt(var + 1e-5), by which it divides z - mean. */
static real standardize(real *out, const real *z, int C)
{
    real mean = 0, var = 0;
    for (int c = 0; c < C; c++) mean += z[c] / C;
    for (int c = 0; c < C; c++) var += (z[c] - mean) * (z[c] - mean) / C;
    real root = sqrt(var + (real)1e-5);
    for (int c = 0; c < C; c++) out[c] = (z[c] - mean) / root;
    return root;
}

static void norm(real *out, const real *z, const Tensor *t)
{
    standardize(out, z, t->rows);
    for (int c = 0; c < t->rows; c++) out[c] = out[c] * t->w[c] + t[1].w[c];
}

/* out = n weight + bias with n = (z - mean) / root, so n has the slope e = d weight. Shifting or
   scaling z leaves n as it is, so dz has no part along (1, ..., 1) or along n: subtract these parts
   of e, mean(e) and n mean(e n), and divide by root. ADDS to dz. */
static void norm_back(real *dz, const real *d, const real *z, const Tensor *t)
{
    int C = t->rows;
    real n[MAX_C], root = standardize(n, z, C), mean_e = 0, mean_en = 0;
    for (int c = 0; c < C; c++) {
        t->g[c] += d[c] * n[c];
        t[1].g[c] += d[c];
        mean_e += d[c] * t->w[c] / C;
        mean_en += d[c] * t->w[c] * n[c] / C;
    }
    for (int c = 0; c < C; c++) dz[c] += (d[c] * t->w[c] - mean_e - n[c] * mean_en) / root;
}

static const real GELU = 0.79788456080286536, CUBE = 0.044715;      /* the first is sqrt(2 / pi) */

static void gelu(real *out, const real *z, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = z[i] / 2 * (1 + tanh(GELU * (z[i] + CUBE * z[i] * z[i] * z[i])));
}

/* The product rule on z/2 (1 + tanh u), with tanh' = 1 - tanh^2 and u' = GELU (1 + 3 CUBE z^2). */
static void gelu_back(real *dz, const real *d, const real *z, int n)
{
    for (int i = 0; i < n; i++) {
        real t = tanh(GELU * (z[i] + CUBE * z[i] * z[i] * z[i]));
        dz[i] = d[i] * ((1 + t) / 2 + z[i] / 2 * (1 - t * t) * GELU * (1 + 3 * CUBE * z[i] * z[i]));
    }
}

/* Turns z into its softmax and returns log sum exp z; without the largest z, exp would overflow. */
static real softmax(real *z, int n)
{
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
static void attention(Layer *z, int t, int C, int H)
{
    int D = C / H;
    memset(z->heads[t], 0, C * sizeof(real));
    for (int c = 0; c < C; c += D) {                    /* c: a head's first channel */
        real *a = z->a[c / D][t];
        for (int s = 0; s <= t; s++)
            a[s] = dot(z->qkv[t] + c, z->qkv[s] + C + c, D) / sqrt((real)D);
        softmax(a, t + 1);
        for (int s = 0; s <= t; s++) add_scaled(z->heads[t] + c, a[s], z->qkv[s] + 2 * C + c, D);
    }
}

/* heads = sum over s of a[s] v[s], so da[s] = d v[s] and dv[s] = a[s] d. a = softmax(w) has the
   slopes da[s] / dw[r] = a[s] ((s == r) - a[r]), so dw[s] = a[s] (da[s] - sum of a da). Then
   w[s] = q k[s] / sqrt(D) gives dq = sum of dw[s] k[s] / sqrt(D) and dk[s] = dw[s] q / sqrt(D). */
static void attention_back(real dqkv[][3 * MAX_C], real d[][MAX_C], const Layer *z, int T, int C,
                           int H)
{
    int D = C / H;
    memset(dqkv, 0, T * sizeof *dqkv);
    for (int t = 0; t < T; t++)
        for (int c = 0; c < C; c += D) {
            const real *a = z->a[c / D][t];
            real da[MAX_S], sum = 0;
            for (int s = 0; s <= t; s++) {
                da[s] = dot(d[t] + c, z->qkv[s] + 2 * C + c, D);
                sum += a[s] * da[s];
                add_scaled(dqkv[s] + 2 * C + c, a[s], d[t] + c, D);
            }
            for (int s = 0; s <= t; s++) {
                real dw = a[s] * (da[s] - sum) / sqrt((real)D);
                add_scaled(dqkv[t] + c, dw, z->qkv[s] + C + c, D);
                add_scaled(dqkv[s] + C + c, dw, z->qkv[t] + c, D);
            }
        }
}

/* Computes the positions from .. to - 1 of the ids x; z has the earlier ones already. */
static void forward(const Model *m, Pass *z, const int *x, int from, int to)
{
    int C = m->C;
    for (int t = from; t < to; t++) {
        for (int c = 0; c < C; c++)
            z->layer[0].in[t][c] = m->tensor[WTE].w[x[t] * C + c] + m->tensor[WPE].w[t * C + c];
        for (int l = 0; l < m->L; l++) {
            const Tensor *w = m->tensor + 12 * l;
            Layer *y = &z->layer[l];
            norm(y->ln_1[t], y->in[t], w + LN_1);
            linear(y->qkv[t], y->ln_1[t], w + ATTN);
            attention(y, t, C, m->H);
            linear(y->attention[t], y->heads[t], w + ATTN_PROJ);
            for (int c = 0; c < C; c++) y->middle[t][c] = y->in[t][c] + y->attention[t][c];
            norm(y->ln_2[t], y->middle[t], w + LN_2);
            linear(y->fc[t], y->ln_2[t], w + FC);
            gelu(y->gelu[t], y->fc[t], 4 * C);
            linear(y->mlp[t], y->gelu[t], w + MLP_PROJ);
            for (int c = 0; c < C; c++) y[1].in[t][c] = y->middle[t][c] + y->mlp[t][c];
        }
        norm(z->hidden[t], z->layer[m->L].in[t], m->tensor + LN_F(m));
    }
}

/* Goes back from d_hidden. d, the slope in the residual stream, goes on unchanged, and each branch
   (MLP, attention) adds the slope that comes back through it. */
static void backward(const Model *m, const Pass *z, const int *x, int T, real d_hidden[][MAX_C])
{
    static real d[MAX_S][MAX_C], d_heads[MAX_S][MAX_C], dqkv[MAX_S][3 * MAX_C];
    real wide[4 * MAX_C], narrow[MAX_C];
    memset(d, 0, sizeof d);
    for (int t = 0; t < T; t++)
        norm_back(d[t], d_hidden[t], z->layer[m->L].in[t], m->tensor + LN_F(m));
    for (int l = m->L - 1; l >= 0; l--) {
        const Tensor *w = m->tensor + 12 * l;
        const Layer *y = &z->layer[l];
        for (int t = 0; t < T; t++) {
            linear_back(wide, d[t], y->gelu[t], w + MLP_PROJ);
            gelu_back(wide, wide, y->fc[t], 4 * m->C);
            linear_back(narrow, wide, y->ln_2[t], w + FC);
            norm_back(d[t], narrow, y->middle[t], w + LN_2);
            linear_back(d_heads[t], d[t], y->heads[t], w + ATTN_PROJ);
        }
        attention_back(dqkv, d_heads, y, T, m->C, m->H);
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

typedef struct { int id[MAX_S + 1], p, n; } Row;        /* p ids of the prompt, n in all */

static Pass pass;                                       /* of the row at hand */
static real d_hidden[MAX_S][MAX_C];

/* Fills probability with the softmax over the words after a hidden state; returns log p(y). */
static real log_softmax(const Model *m, const real *hidden, real temperature, int y,
                        real *probability)
{
    for (int v = 0; v < m->V; v++)
        probability[v] = dot(hidden, m->tensor[WTE].w + v * m->C, m->C) / temperature;
    real logit = probability[y];
    return logit - softmax(probability, m->V);
}

/* Fills logprob at the positions that predict a row's response; returns their sum. */
static double row_logprobs(const Model *m, const Row *row, real temperature, real *logprob)
{
    real probability[MAX_V];
    double sum = 0;
    forward(m, &pass, row->id, 0, row->n - 1);
    for (int t = row->p - 1; t < row->n - 1; t++)
        sum += logprob[t] = log_softmax(m, pass.hidden[t], temperature, row->id[t + 1],
                                        probability);
    return sum;
}

/* Goes back from the slopes d in a row's logprobs. logprob = logit[y] - log sum exp logit with
   logit = wte hidden / temperature, so logit[v] has the slope d ((v == y) - probability[v]). wte
   gets slopes here and as the embedding of the ids. */
static void row_logprobs_back(const Model *m, const Row *row, real temperature, const real *d)
{
    real probability[MAX_V];
    forward(m, &pass, row->id, 0, row->n - 1);          /* again: pass may hold another row */
    memset(d_hidden, 0, sizeof d_hidden);
    for (int t = row->p - 1; t < row->n - 1; t++) {
        log_softmax(m, pass.hidden[t], temperature, row->id[t + 1], probability);
        for (int v = 0; v < m->V; v++) {
            real d_logit = d[t] * ((v == row->id[t + 1]) - probability[v]) / temperature;
            add_scaled(d_hidden[t], d_logit, m->tensor[WTE].w + v * m->C, m->C);
            add_scaled(m->tensor[WTE].g + v * m->C, d_logit, pass.hidden[t], m->C);
        }
    }
    backward(m, &pass, row->id, row->n - 1, d_hidden);
}

/* Fills out with a scalar model's numbers, scores or values, at the first T positions. */
static void numbers(const Model *m, const Row *row, int T, real *out)
{
    forward(m, &pass, row->id, 0, T);
    for (int t = 0; t < T; t++) out[t] = dot(pass.hidden[t], score_of(m)->w, m->C);
}

/* Goes back from the slopes d in these numbers. */
static void numbers_back(const Model *m, const Row *row, int T, const real *d)
{
    forward(m, &pass, row->id, 0, T);
    memset(d_hidden, 0, sizeof d_hidden);
    for (int t = 0; t < T; t++) {
        add_scaled(d_hidden[t], d[t], score_of(m)->w, m->C);
        add_scaled(score_of(m)->g, d[t], pass.hidden[t], m->C);
    }
    backward(m, &pass, row->id, T, d_hidden);
}

/* Returns the score of a response: the number at its last id, which is read like all others. */
static real score(const Model *m, const Row *row)
{
    real out[MAX_S];
    numbers(m, row, row->n, out);
    return out[row->n - 1];
}

/* Draws the first word whose cumulative probability exceeds u; their sum is 1 but for rounding. */
static int draw(const real *probability, int V, real u)
{
    real sum = 0, total = 0;
    for (int v = 0; v < V; v++) total += probability[v];
    for (int v = 0; v < V; v++)
        if ((sum += probability[v]) > u * total)
            return v;
    return V - 1;
}

/* Appends a response of at most so many ids to a row's prompt, with a uniform number u for each. */
static void respond(const Model *m, Row *row, int eos, int most, real temperature, const real *u)
{
    real probability[MAX_V];
    int id = -1;
    for (row->n = row->p; row->n < row->p + most && id != eos; row->n++) {
        forward(m, &pass, row->id, row->n == row->p ? 0 : row->n - 1, row->n);
        log_softmax(m, pass.hidden[row->n - 1], temperature, 0, probability);
        row->id[row->n] = id = draw(probability, m->V, u[row->n - row->p]);
    }
}

/* ----------------------------------------------------------------------- optimizer and batches */

static struct {         /* what optimizer and methods are given; every stage sets its own */
    double weight_decay, grad_clip, adam_eps, beta, label_smoothing, temperature, no_eos_score;
    double gamma, gae_lambda, clip_eps, vf_clip, ref_ema;
    int ipo;
} set;

/* Clips the gradient, takes a step of AdamW and empties the gradient; returns its norm before. */
static double step(Model *m, double rate)
{
    double norm = 0, first = 1 - pow(0.9, ++m->steps), second = 1 - pow(0.95, m->steps);
    for (int i = 0; i < m->size; i++) norm += (double)m->g[i] * m->g[i];
    norm = sqrt(norm);
    real scale = fmin(1.0, set.grad_clip / (norm + 1e-6));
    for (const Tensor *t = m->tensor; t < m->tensor + m->tensors; t++) {
        real decay = t->columns ? rate * set.weight_decay : 0;      /* matrices alone decay */
        for (int i = 0; i < t->rows * (t->columns ? t->columns : 1); i++) {
            real g = scale * t->g[i];
            t->m[i] = (real)0.9 * t->m[i] + (real)0.1 * g;
            t->v[i] = (real)0.95 * t->v[i] + (real)0.05 * g * g;
            t->w[i] -= decay * t->w[i];
            t->w[i] -= rate * (t->m[i] / first) / (sqrt(t->v[i] / second) + set.adam_eps);
        }
    }
    memset(m->g, 0, m->size * sizeof *m->g);
    return norm;
}

/* Returns the rate of step s of n: linear warm-up, then a cosine to a tenth of the peak. */
static double rate(int s, int n, double peak, int warmup)
{
    if (s < warmup)
        return peak * (s + 1) / warmup;
    double progress = (double)(s - warmup) / fmax(1, n - 1 - warmup);
    return peak * (0.1 + 0.9 * (1 + cos(PI * progress)) / 2);
}

/* Copies part i of k of n indices; the sizes are as even as can be, the larger ones first. */
static int part(const int *all, int n, int k, int i, int *out)
{
    int size = n / k + (i < n % k);
    memcpy(out, all + i * (n / k) + min(i, n % k), size * sizeof *out);
    return size;
}

/* Fills indices with the rows of the batch of step s = 0, 1, ...; returns how many there are. */
static int batch(int seed, const int *length, int rows, int size, int s, int *indices)
{
    int per_epoch = (rows + size - 1) / size, order[MAX_ROWS], visits[MAX_ROWS];
    Random r = stream(seed, s / per_epoch, "batch");
    permutation(&r, order, rows);
    for (int i = 0; i < rows; i++)          /* a stable sort by length within each 16 batches */
        for (int j = i; j % (16 * size) && length[order[j]] < length[order[j - 1]]; j--) {
            int kept = order[j];
            order[j] = order[j - 1], order[j - 1] = kept;
        }
    permutation(&r, visits, per_epoch);
    return part(order, rows, per_epoch, visits[s % per_epoch], indices);
}

/* ------------------- the four methods: each adds one example's gradient and returns its loss times
   weight, which is 1 / the number of pairs in the batch, or of response ids in SFT and PPO */

typedef struct { Row chosen, rejected; double ref_chosen, ref_rejected; } Pair;

static void fill(real *d, double value) { for (int t = 0; t < MAX_S; t++) d[t] = value; }

/* SFT imitates the chosen side: - logprob. */
static double sft(const Model *policy, const Pair *pair, double weight)
{
    real logprob[MAX_S], d[MAX_S];
    double loss = -row_logprobs(policy, &pair->chosen, 1, logprob) * weight;
    fill(d, -weight);
    row_logprobs_back(policy, &pair->chosen, 1, d);
    return loss;
}

/* log(1 / (1 + e^-z)), of which sigmoid(-z) is the slope; this exp cannot overflow. */
static double log_sigmoid(double z) { return fmin(z, 0) - log1p(exp(-fabs(z))); }
static double sigmoid(double z) { return exp(log_sigmoid(z)); }

/* Reward model (Bradley and Terry): - log sigmoid(chosen's score - rejected's score). */
static double rm(const Model *m, const Pair *pair, double weight)
{
    int i = pair->chosen.n - 1, j = pair->rejected.n - 1;       /* where the scores are read */
    double margin = score(m, &pair->chosen) - score(m, &pair->rejected);
    real up[MAX_S] = {0}, down[MAX_S] = {0};
    up[i] = -sigmoid(-margin) * weight, down[j] = -up[i];
    numbers_back(m, &pair->chosen, i + 1, up);
    numbers_back(m, &pair->rejected, j + 1, down);
    return -log_sigmoid(margin) * weight;
}

/* DPO: - log sigmoid(beta h), where h is how much more the policy prefers the chosen response than
   the reference does; with label smoothing e, a label is right with probability 1 - e. IPO pulls h
   to 1 / (2 beta). Returns the loss; d is its slope in h. */
static double dpo_loss(double h, double *d)
{
    double e = set.label_smoothing, margin = set.beta * h, gap = h - 1 / (2 * set.beta);
    *d = set.ipo ? 2 * gap : set.beta * (sigmoid(margin) - (1 - e));
    return set.ipo ? gap * gap : -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin);
}

/* h has the slope 1 in the chosen side's logprobs and -1 in the rejected side's. */
static double dpo(const Model *policy, const Pair *pair, double weight)
{
    real slopes[MAX_S];
    double d, h = row_logprobs(policy, &pair->chosen, 1, slopes) - pair->ref_chosen
                  - (row_logprobs(policy, &pair->rejected, 1, slopes) - pair->ref_rejected);
    double loss = dpo_loss(h, &d) * weight;
    fill(slopes, d * weight);
    row_logprobs_back(policy, &pair->chosen, 1, slopes);
    fill(slopes, -d * weight);
    row_logprobs_back(policy, &pair->rejected, 1, slopes);
    return loss;
}

/* PPO: a sampled row, with the numbers that stay the same in all passes over its rollout batch. */
typedef struct {
    Row row;
    int ended;
    real raw, logprob[MAX_S], ref_logprob[MAX_S], value[MAX_S];
    real reward[MAX_S], advantage[MAX_S], returns[MAX_S], white[MAX_S];
} Episode;

/* Scores a response; computes rewards and, from its end backwards, advantages (GAE) and returns. */
static void judge(Episode *e, const Model *policy, const Model *ref, const Model *reward_model,
                  double shift, const Model *value_model, int eos)
{
    int last = e->row.n - 2;
    real next_value = 0, advantage = 0;
    row_logprobs(policy, &e->row, set.temperature, e->logprob);
    row_logprobs(ref, &e->row, set.temperature, e->ref_logprob);
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
static void whiten(Episode *episodes, int size)
{
    double mean = 0, var = 0;
    for (int round = 0, M = 0; round < 3; round++)
        for (Episode *e = episodes; e < episodes + size; e++)
            for (int t = e->row.p - 1; t < e->row.n - 1; t++) {
                double gap = e->advantage[t] - mean;
                if (round == 0) mean += gap / ++M;      /* the mean of those so far */
                if (round == 1) var += gap * gap / M;
                if (round == 2) e->white[t] = gap / sqrt(var + 1e-8);
            }
}

/* Returns an id's clipped loss; d is its slope in the logprob, since d ratio / d logprob = ratio. */
static double policy_loss(double logprob, double old_logprob, double advantage, double *d)
{
    double ratio = exp(logprob - old_logprob), plain = -advantage * ratio;
    double clipped = -advantage * fmin(fmax(ratio, 1 - set.clip_eps), 1 + set.clip_eps);
    *d = plain >= clipped ? plain : 0;
    return fmax(plain, clipped);
}

/* Returns half the squared error or, if the value has moved by more than vf_clip (0: off), that of
   the value moved by vf_clip alone, should it be larger; d is the slope in the value. */
static double value_loss(double value, double old_value, double returns, double *d)
{
    double error = value - returns, moved = value - old_value;
    double clipped = old_value + copysign(set.vf_clip, moved) - returns;
    int clip = set.vf_clip && fabs(moved) > set.vf_clip && clipped * clipped > error * error;
    *d = clip ? 0 : error;
    return (clip ? clipped * clipped : error * error) / 2;
}

static double ppo(const Model *policy, const Model *value_model, const Episode *e, double weight,
                  double *vf_loss)
{
    real logprob[MAX_S], value[MAX_S], d_value[MAX_S] = {0};
    double pg_loss = 0, d;
    row_logprobs(policy, &e->row, set.temperature, logprob);
    numbers(value_model, &e->row, e->row.n - 1, value);
    for (int t = e->row.p - 1; t < e->row.n - 1; t++) {
        pg_loss += policy_loss(logprob[t], e->logprob[t], e->white[t], &d) * weight;
        logprob[t] = d * weight;                        /* from here on, its slope */
        *vf_loss += value_loss(value[t], e->value[t], e->returns[t], &d) * weight;
        d_value[t] = d * weight;
    }
    row_logprobs_back(policy, &e->row, set.temperature, logprob);
    numbers_back(value_model, &e->row, e->row.n - 1, d_value);
    return pg_loss;
}

/* ------------------------------------------------ the run: rows of rows.txt, numbers of run.json */

static FILE *rows_file, *run_file;
static int differences;

static FILE *open_file(const char *folder, const char *name)
{
    char path[1000];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file) perror(path), exit(2);
    return file;
}

/* Reads the next group of rows: a name, how many they are, and for each row three counts and their
   ids: prompt, chosen (a demonstration too) and rejected response. Returns how many they are. */
static int read_rows(Pair *pairs)
{
    int rows = 0;
    if (fscanf(rows_file, "%*s %d", &rows) != 1 || rows > MAX_ROWS) exit(2);
    for (Pair *pair = pairs; pair < pairs + rows; pair++) {
        Row *a = &pair->chosen, *b = &pair->rejected;
        int chosen, rejected;
        if (fscanf(rows_file, "%d %d %d", &a->p, &chosen, &rejected) != 3) exit(2);
        for (a->n = 0; a->n < a->p + chosen; a->n++) fscanf(rows_file, "%d", &a->id[a->n]);
        *b = *a;
        for (b->n = b->p; b->n < b->p + rejected; b->n++) fscanf(rows_file, "%d", &b->id[b->n]);
        if (!rejected) b->n = 0;
    }
    return rows;
}

/* Reads run.json up to a key, which must come. */
static void find(const char *key)
{
    char word[64] = "";
    while (strcmp(word, key))
        if (fscanf(run_file, "%*[^\"]\"%63[^\"]\"", word) != 1)
            fprintf(stderr, "run.json has no %s here\n", key), exit(2);
}

static void compare(const char *key, double ours)
{
    double theirs = NAN;
    find(key);
    fscanf(run_file, "%*[: ]%lf", &theirs);
    int agrees = fabs(ours - theirs) <= 1e-4 * fmax(1, fabs(theirs));
    differences += !agrees;
    printf(" %s %.5f (%.5f %s)", key, ours, theirs, agrees ? "agrees" : "DIFFERS");
}

static void compare_ids(const int *ids, int n)          /* with the next n ids in run.json */
{
    int theirs, agree = 1;
    for (int i = 0; i < n; i++)
        agree &= fscanf(run_file, "%*[^0-9]%d", &theirs) == 1 && theirs == ids[i];
    if (!agree) printf(" ids DIFFER");
    differences += !agree;
}

/* Trains by SFT, as a reward model or by DPO. */
static void train(const char *stage, Model *m, double method(const Model *, const Pair *, double),
                  const Pair *pairs, int rows, double peak)
{
    int length[MAX_ROWS], indices[MAX_ROWS];
    for (int i = 0; i < rows; i++) length[i] = pairs[i].chosen.n + pairs[i].rejected.n;
    for (int s = 0; s < 10; s++) {
        int size = batch(0, length, rows, 8, s, indices), count = 0;
        double loss = 0;
        for (int i = 0; i < size; i++)
            count += method == sft ? pairs[indices[i]].chosen.n - pairs[indices[i]].chosen.p : 1;
        for (int i = 0; i < size; i++) loss += method(m, &pairs[indices[i]], 1.0 / count);
        printf("%s %2d", stage, s + 1);
        find("rows"), compare_ids(indices, size);
        compare("loss", loss);
        compare("norm", step(m, rate(s, 10, peak, 3)));
        puts("");
    }
}

static void train_ppo(Model *policy, const Model *reward_model, double shift, Pair *prompts, int rows)
{
    enum { STEPS = 3, ROLLOUT = 16, PASSES = 2, MINIBATCH = 8, NEW = 24, EOS = MAX_V - 1 };
    static Episode episodes[ROLLOUT];
    Model ref = copy_of(policy, 0), value_model = copy_of(reward_model, 1);
    int ones[MAX_ROWS], indices[MAX_ROWS], order[ROLLOUT], mini[ROLLOUT];
    for (int i = 0; i < rows; i++) ones[i] = 1;         /* so that prompts are not sorted by length */
    memset(score_of(&value_model)->w, 0, policy->C * sizeof(real));     /* a value is not a score */
    for (int s = 0; s < STEPS; s++) {
        int size = batch(0, ones, rows, ROLLOUT, s, indices), updates = 0, length = 0, ended = 0;
        double score = 0, kl = 0, entropy = 0, pg_loss = 0, vf_loss = 0, norm = 0;
        Random r = stream(0, s, "rollout");
        printf("ppo %d", s + 1);
        find("rows"), compare_ids(indices, size), find("ids");
        for (int b = 0; b < size; b++) {
            Episode *e = &episodes[b];
            real u[NEW];
            for (int i = 0; i < NEW; i++) u[i] = uniform(&r);
            e->row = prompts[indices[b]].chosen;
            respond(policy, &e->row, EOS, NEW, set.temperature, u);
            compare_ids(e->row.id + e->row.p, e->row.n - e->row.p);
            judge(e, policy, &ref, reward_model, shift, &value_model, EOS);
            score += e->raw / size, ended += e->ended, length += e->row.n - e->row.p;
            for (int t = e->row.p - 1; t < e->row.n - 1; t++)
                kl += (e->logprob[t] - e->ref_logprob[t]) / size, entropy -= e->logprob[t];
        }
        whiten(episodes, size);
        for (int pass = 0; pass < PASSES; pass++) {
            int parts = (size + MINIBATCH - 1) / MINIBATCH;
            r = stream(0, s * PASSES + pass, "shuffle");
            permutation(&r, order, size);
            for (int k = 0; k < parts; k++, updates++) {
                int n = part(order, size, parts, k, mini), ids = 0;
                for (int i = 0; i < n; i++) ids += episodes[mini[i]].row.n - episodes[mini[i]].row.p;
                for (int i = 0; i < n; i++)
                    pg_loss += ppo(policy, &value_model, &episodes[mini[i]], 1.0 / ids, &vf_loss);
                norm += step(policy, rate(s, STEPS, 3e-3, 1));
                step(&value_model, rate(s, STEPS, 2e-3, 1));
            }
        }
        for (int i = 0; i < ref.size; i++)              /* the reference follows, once per rollout */
            ref.w[i] += set.ref_ema * (policy->w[i] - ref.w[i]);
        compare("score", score), compare("kl", kl), compare("entropy", entropy / length);
        compare("length", (double)length / size), compare("eos", (double)ended / size);
        compare("pg_loss", pg_loss / updates), compare("vf_loss", vf_loss / updates);
        compare("norm", norm / updates), puts("");
    }
}

int main(int count, char **words)
{
    static Pair demonstrations[MAX_ROWS], held_out[MAX_ROWS], pairs[MAX_ROWS], held_out_pairs[MAX_ROWS];
    static Pair prompts[MAX_ROWS];
    rows_file = open_file(count > 1 ? words[1] : ".", "rows.txt");
    run_file = open_file(count > 1 ? words[1] : ".", "run.json");
    int n_sft = read_rows(demonstrations), n_val = read_rows(held_out), n_pairs = read_rows(pairs);
    int n_val_pairs = read_rows(held_out_pairs), n_prompts = read_rows(prompts), ids = 0;
    double loss = 0, shift = 0;
    real logprob[MAX_S];

    set.weight_decay = 0.1, set.grad_clip = 1, set.adam_eps = 1e-8;
    Model policy = new_model(768, 128, 2, 4, 64, 0);
    initialize(&policy, 0, 0.1);
    train("sft", &policy, sft, demonstrations, n_sft, 6e-3);
    for (int i = 0; i < n_val; i++) {
        loss -= row_logprobs(&policy, &held_out[i].chosen, 1, logprob);
        ids += held_out[i].chosen.n - held_out[i].chosen.p;
    }
    compare("eval_loss", loss / ids), puts("");

    Model reward_model = copy_of(&policy, 1);
    train("rm ", &reward_model, rm, pairs, n_pairs, 3e-3);
    for (int i = 0; i < n_val_pairs; i++) {             /* the shift makes held-out scores 0 on average */
        shift += score(&reward_model, &held_out_pairs[i].chosen) / (2 * n_val_pairs);
        shift += score(&reward_model, &held_out_pairs[i].rejected) / (2 * n_val_pairs);
    }
    compare("shift", shift), puts("");

    set.weight_decay = 0, set.beta = 0.2;
    Model dpo_policy = copy_of(&policy, 0);
    for (int i = 0; i < n_pairs; i++) {
        pairs[i].ref_chosen = row_logprobs(&policy, &pairs[i].chosen, 1, logprob);
        pairs[i].ref_rejected = row_logprobs(&policy, &pairs[i].rejected, 1, logprob);
    }
    train("dpo", &dpo_policy, dpo, pairs, n_pairs, 1e-3);

    set.adam_eps = 1e-5, set.temperature = 0.9, set.no_eos_score = -1, set.gamma = 0.98;
    set.gae_lambda = 0.95, set.clip_eps = 0.2, set.vf_clip = 0.2, set.ref_ema = 0.1;
    Model ppo_policy = copy_of(&policy, 0);
    train_ppo(&ppo_policy, &reward_model, shift, prompts, n_prompts);
    printf(differences ? "%d numbers DIFFER\n" : "all numbers agree\n", differences);
    return differences > 0;
}
